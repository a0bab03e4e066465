"""The command that follows an inspection: a name that works, a path that can be written."""

from __future__ import annotations

from pathlib import Path

import pytest

from port_kit.inspect.port_name import new_command, port_name


@pytest.mark.parametrize(
    ("target", "name"),
    [
        ("Lightricks/LTX-Video", "ltx_video"),
        ("org/Some.Model--v1.5", "some_model_v1_5"),
        ("org/3d-things", "m3d_things"),
        ("org/漢字", "model"),
        ("org/my-bagel-model", "my_port"),  # vLLM-Omni would serve its own bagel
        ("org/" + "long-" * 20, "long_long_long_long_long_long"),
    ],
)
def test_names_are_modules_names(target: str, name: str) -> None:
    assert port_name(target) == name
    assert name.isidentifier()


def test_a_folder_is_called_by_its_own_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "Some Model").mkdir()
    monkeypatch.chdir(tmp_path / "Some Model")
    assert port_name(".") == "some_model"
    assert new_command(str(tmp_path / "Some Model"), "custom", "", "").endswith(f"--from '{tmp_path}/Some Model'")


@pytest.mark.parametrize(
    ("path", "pipeline", "transformer", "options"),
    [
        ("diffusers", "LTXPipeline", "LTXVideoTransformer3DModel", ""),
        ("diffusers", "LTXImageToVideoPipeline", "LTXVideoTransformer3DModel", "--path hybrid "),
        ("diffusers", "CogVideoXPipeline", "CogVideoXTransformer3DModel", "--path hybrid "),
        ("hybrid", "", "", ""),
        ("custom", "", "", ""),
    ],
)
def test_an_unsupported_transformer_is_ported_with_its_other_components(
    path: str, pipeline: str, transformer: str, options: str
) -> None:
    command = new_command("org/model_x", path, pipeline, transformer)  # type: ignore[arg-type]
    assert command == f"port-kit new model_x {options}--from org/model_x"
