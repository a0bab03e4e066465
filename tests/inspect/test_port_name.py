"""The command that follows an inspection: a name that works, a path that can be written."""

from __future__ import annotations

from pathlib import Path

import pytest

from port_kit.inspect.port_name import next_command, port_name


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
    assert next_command(str(tmp_path / "Some Model"), "custom", "").endswith(f"--from '{tmp_path}/Some Model'")


@pytest.mark.parametrize(
    ("path", "transformer", "command"),
    [
        ("diffusers", "FluxTransformer2DModel", "port-kit new model_x --from org/model_x"),
        ("diffusers", "LTXVideoTransformer3DModel", "port-kit new model_x --from org/model_x"),
        ("diffusers", "UNet2DConditionModel", "port-kit run org/model_x --cfg-parallel-size 2"),
        ("diffusers", "", "port-kit new model_x --path hybrid --from org/model_x"),
        ("hybrid", "", "port-kit new model_x --from org/model_x"),
        ("custom", "", "port-kit new model_x --from org/model_x"),
    ],
)
def test_the_command_follows_from_the_path_and_the_plan(path: str, transformer: str, command: str) -> None:
    assert next_command("org/model_x", path, transformer) == command  # type: ignore[arg-type]
