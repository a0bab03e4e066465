"""``port-kit new``: its errors, and the facts that it reads from a repository."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from port_kit.autoparallel import shipped
from port_kit.autoparallel.coverage import planned_coverage
from port_kit.autoparallel.shipped import SHIPPED
from port_kit.cli import main
from port_kit.download import FileRule, Recipe
from port_kit.inspect import inspect
from port_kit.port import HostedPort
from port_kit.scaffold import NewPort, new_port, plans
from port_kit.scaffold.own_port import own_files
from port_kit.scaffold.pipeline_files import file_patterns
from port_kit.scaffold.render import TEMPLATES, literal
from port_kit.scaffold.source import Source
from tests.helpers import raises
from tests.inspect import fake_repositories

ID = "org/some-model"
CURL_VIDEO = Path(__file__).parents[2] / "examples" / "online_serving" / "curl_video.sh"


@pytest.mark.parametrize(
    ("name", "mentioned"),
    [
        ("My-Model", "My-Model"),
        ("class", "class"),
        ("a" * 31, "a" * 31),
        ("json", "json"),
        ("dreamid_omni", "dreamid_omni"),
        ("my_bagel", "bagel"),
        ("qwen_image", "QwenImagePipeline"),
    ],
)
def test_misleading_names_are_refused(name: str, mentioned: str, tmp_path: Path) -> None:
    with raises("scaffold_name", mentioned):
        NewPort(name, "custom", tmp_path)


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with raises("scaffold_target", str(tmp_path)):
        new_port(NewPort("some_port", "custom", tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def new_hosted(files: fake_repositories.Files, folder: Path) -> None:
    """Write a port of a pipeline of diffusers in a folder."""
    source = fake_repositories.write(files, folder / "model")
    new_port(NewPort("some_port", "diffusers", folder / "port", source=str(source)), report=lambda _line: None)


def test_a_pipeline_needs_a_source(tmp_path: Path) -> None:
    with raises("scaffold_unsupported", "--from is not given"):
        new_port(NewPort("some_port", "diffusers", tmp_path / "port"))


def test_what_is_no_pipeline_of_diffusers_is_refused(tmp_path: Path) -> None:
    with raises("scaffold_unsupported", "MyOwnPipeline") as caught:
        new_hosted(fake_repositories.hybrid_model(), tmp_path)
    assert caught.value.hint == "take --path hybrid"


def test_a_class_without_a_tiny_configuration_is_refused(tmp_path: Path) -> None:
    files = fake_repositories.diffusers_model("StableDiffusionPipeline", "UNet2DConditionModel")
    with raises("plan_subject", "UNet2DConditionModel"):
        new_hosted(files, tmp_path)
    assert not (tmp_path / "port").exists()


def test_weights_that_diffusers_does_not_load_are_refused(tmp_path: Path) -> None:
    files = fake_repositories.diffusers_model("FluxPipeline", "FluxTransformer2DModel")
    del files["vae/diffusion_pytorch_model.safetensors"]
    files["vae/diffusion_pytorch_model.bin"] = fake_repositories.torch_file(fake_repositories.torch_tensors("a"))
    with raises("scaffold_unsupported", "vae/diffusion_pytorch_model.bin", "torch zip"):
        new_hosted(files, tmp_path)


def test_findings_are_reported_if_nothing_is_proven(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(shipped, "SHIPPED", tmp_path)
    monkeypatch.setattr(plans, "DEFAULT_LAYOUTS", ("ulysses2",))
    with raises("scaffold_unsupported", "PriorTransformer", "ulysses2 not proven") as caught:
        plans.plan_of_class("PriorTransformer", lines.append)
    assert caught.value.details["problems"] and lines


def test_a_port_of_a_shipped_plan_is_data(tmp_path: Path) -> None:
    new_hosted(fake_repositories.diffusers_model("FluxPipeline", "FluxTransformer2DModel"), tmp_path)
    package = tmp_path / "port" / "some_port"
    assert sorted(path.name for path in package.iterdir()) == ["__init__.py", "config.py", "plan.toml", "recipe.py"]
    assert (package / "plan.toml").read_text() == (SHIPPED / "FluxTransformer2DModel.toml").read_text()
    recipe = _recipe(package / "recipe.py")
    assert recipe.model_index["_class_name"] == "SomePortPipeline"
    assert recipe.model_index["vae"] == ["diffusers", "AutoencoderDC"]
    patterns = [rule.pattern for rule in recipe.repositories[0].files if rule.folder == "transformer"]
    assert patterns == [
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors.index.json",
        "transformer/diffusion_pytorch_model-*-of-00002.safetensors",
    ]
    port = _port(package)
    assert (port.hosted, port.output_type, port.references) == ("FluxPipeline", "image", ())
    assert port.request_options["true_cfg_scale"] == "float"
    assert port.components[0].config == "some_port.config:TRANSFORMER_CONFIG"


def test_a_plan_covers_every_weight_at_full_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = fake_repositories.diffusers_model("FluxPipeline", "FluxTransformer2DModel")
    files["transformer/config.json"] = fake_repositories.as_json({"_class_name": "FluxTransformer2DModel"})
    new_hosted(files, tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path / "port"))
    try:
        port = _port(tmp_path / "port" / "some_port")
        for ranks in (1, 2, 8):
            report = planned_coverage(port, "transformer", ranks)
            assert report.ok, report.to_text()
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "some_port"]:
            del sys.modules[name]


def _port(package: Path) -> HostedPort:
    """Execute the ``__init__.py`` of a package."""
    space: dict[str, object] = {"__name__": package.name}
    exec(compile((package / "__init__.py").read_text(), str(package), "exec"), space)
    port = space["PORT"]
    assert isinstance(port, HostedPort)
    return port


def test_the_command_reports_missing_and_written_files(tmp_path: Path) -> None:
    run = CliRunner().invoke
    assert run(main, ["new", "some_port"]).exit_code == 2
    target = tmp_path / "port"
    done = run(main, ["new", "some_port", "--path", "bypass", "--output-dir", str(target), "--json"])
    data = json.loads(done.stdout)["data"]
    assert (done.exit_code, data["path"]) == (0, "bypass")
    spaced = tmp_path / "a port"
    done = run(main, ["new", "some_port", "--path", "custom", "--output-dir", str(spaced)])
    assert done.stdout.endswith(f"next: cd '{spaced}' && pytest\n")
    assert sorted(data["files"]) == sorted(str(p.relative_to(target)) for p in target.rglob("*") if p.is_file())


@pytest.mark.parametrize(("output", "suffix"), [("audio", "wav"), ("image", "png"), ("video", "mp4")])
def test_the_files_fit_the_output(output: str, suffix: str, tmp_path: Path) -> None:
    target = tmp_path / "port"
    options = ["--path", "custom", "--output", output, "--output-dir", str(target)]
    assert CliRunner().invoke(main, ["new", "some_net", *options]).exit_code == 0
    assert f'output_type="{output}"' in (target / "some_net" / "__init__.py").read_text()
    assert f"-o out.{suffix}" in (target / "generate_some_net.py").read_text()
    assert f'"out.{suffix}"' in (target / "tests" / "test_generate.py").read_text()
    scripts = {path.name: path for path in target.glob("*.sh")}
    assert {"run_server.sh", f"run_curl_text_to_{output}.sh"} == set(scripts) - {"curl_video.sh"}
    assert all(os.access(path, os.X_OK) for path in scripts.values())
    recipe = (target / "RECIPE.md").read_text()
    assert f"./run_curl_text_to_{output}.sh" in recipe and "./run_server.sh MODEL --ulysses-degree 2" in recipe
    if output == "video":
        assert scripts["curl_video.sh"].read_text() == CURL_VIDEO.read_text()


def test_an_output_that_the_path_cannot_have_is_refused(tmp_path: Path) -> None:
    with raises("scaffold_unsupported", "audio") as caught:
        NewPort("some_net", "hybrid", tmp_path, output="audio")
    assert caught.value.hint == "port-kit new some_net --path custom --output audio"
    given = ["--path", "diffusers", "--output", "audio"]
    assert CliRunner().invoke(main, ["new", "some_net", *given]).exit_code == 2


def new_found(files: fake_repositories.Files, folder: Path) -> Path:
    """Write a port of a custom model in a folder; return its package."""
    source = str(fake_repositories.write(files, folder / "model"))
    new_port(NewPort("some_net", "custom", folder / "port", source=source, repositories=(ID,)))
    return folder / "port" / "some_net"


def _recipe(path: Path) -> Recipe:
    """Execute a generated recipe without its package."""
    source = path.read_text().replace("from some_net import config", "")
    space: dict[str, object] = {"config": _NoConfig()}
    exec(compile(source, str(path), "exec"), space)
    recipe = space["RECIPE"]
    assert isinstance(recipe, Recipe)
    return recipe


class _NoConfig:
    """The configurations of a port, all empty."""

    def __getattr__(self, name: str) -> dict[str, object]:
        return {}


@pytest.mark.parametrize(("wrapper", "taken"), [((), "model"), (("--wrapper", "ema"), "ema")])
def test_a_set_of_tensors_is_taken_from_the_state_of_a_trainer(
    wrapper: tuple[str, ...], taken: str, tmp_path: Path
) -> None:
    """Objects beside the sets are not judged; the choice is named, and can be changed."""
    weights = fake_repositories.torch_tensors("blocks.0.weight")
    state = {"model": weights, "ema": weights, "opt": {"state": {}}, "args": argparse.Namespace(lr=1)}
    source = fake_repositories.write({"net.pt": fake_repositories.torch_file(state)}, tmp_path / "model")
    given = ["some_net", "--path", "custom", "--from", str(source), "--repository", ID, *wrapper]
    done = CliRunner().invoke(main, ["new", *given, "--output-dir", str(tmp_path / "port")])
    assert done.exit_code == 0, done.output
    assert f"{taken} is taken" in done.stderr and "port-kit new --wrapper" in done.stderr
    (rule,) = _recipe(tmp_path / "port" / "some_net" / "recipe.py").repositories[0].files
    assert rule.wrapper == taken and json.loads((tmp_path / "port" / "some_net" / "transformer.json").read_text())


def test_a_wrapper_that_no_pickle_has_is_refused(tmp_path: Path) -> None:
    files = {"net.pt": fake_repositories.torch_file({"model": fake_repositories.torch_tensors("a", "b")})}
    source = str(fake_repositories.write(files, tmp_path / "model"))
    with raises("scaffold_unsupported", "'ema'", "there is: model"):
        new_port(NewPort("a_net", "custom", tmp_path / "port", source=source, repositories=(ID,), wrapper="ema"))


def test_file_names_of_a_repository_stay_text(tmp_path: Path) -> None:
    files = {'x"+str(1)+".safetensors': fake_repositories.safetensors({"blocks.0.weight": (4, 4)})}
    recipe = _recipe(new_found(files, tmp_path) / "recipe.py")
    assert recipe.repositories[0].files[0].pattern == next(iter(files))


def test_shards_are_named_by_their_pattern_and_pickles_are_converted(tmp_path: Path) -> None:
    def rule_of(files: fake_repositories.Files) -> FileRule:
        place = tmp_path / str(len(list(tmp_path.iterdir())))
        return _recipe(new_found(files, place) / "recipe.py").repositories[0].files[0]

    shards = [f"net-0000{part}-of-00002" for part in (1, 2)]
    pickles = {f"{name}.bin": fake_repositories.torch_file(fake_repositories.torch_tensors(name)) for name in shards}
    assert rule_of(pickles) == FileRule("net-*-of-00002.bin", folder="transformer", convert=True)
    tensors = {f"weights/{name}.safetensors": fake_repositories.safetensors({name: (4, 4)}) for name in shards}
    tensors["vae.safetensors"] = fake_repositories.safetensors({"a": (2,)})
    assert rule_of(tensors) == FileRule("weights/net-*-of-00002.safetensors", folder="transformer")
    short = {"net.sft": fake_repositories.safetensors({"a": (4, 4)})}
    assert rule_of(short) == FileRule("net.sft", folder="transformer", name="model.safetensors")
    wrapped = {"net[1].pt": fake_repositories.torch_file({"ema": fake_repositories.torch_tensors("a")})}
    expected = {"name": "model.safetensors", "convert": True, "wrapper": "ema"}
    assert rule_of(wrapped) == FileRule("net[[]1].pt", folder="transformer", **expected)


@pytest.mark.parametrize(
    ("file", "content", "kind"),
    [
        ("net-q4.gguf", fake_repositories.gguf("flux", {"a.weight": ((8, 4), 12)}), "gguf"),
        ("net.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "LFS"),
        ("net.pth", b"<!DOCTYPE html><html>404</html>", "HTML"),
        ("net.onnx", b"onnx", "onnx"),
    ],
)
def test_weights_that_no_download_can_use_are_refused(file: str, content: bytes, kind: str, tmp_path: Path) -> None:
    with raises("scaffold_unsupported", file, kind):
        new_found({file: content}, tmp_path)
    assert not (tmp_path / "port").exists()


def test_names_that_no_text_can_hold_are_written_as_escapes(tmp_path: Path) -> None:
    name = os.fsdecode(b"\xff\x7f.safetensors")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / name).write_bytes(fake_repositories.safetensors({"a.weight": (4, 4)}))
    recipe = _recipe(new_found({}, tmp_path) / "recipe.py")
    assert recipe.repositories[0].files[0].pattern == name


def test_a_folder_needs_the_repository_that_has_its_files(tmp_path: Path) -> None:
    files = {"net.safetensors": fake_repositories.safetensors({"a": (4, 4)})}
    source = str(fake_repositories.write(files, tmp_path / "model"))
    with raises("scaffold_unsupported", source, "expected the repository") as caught:
        new_port(NewPort("some_net", "custom", tmp_path / "port", source=source))
    assert caught.value.hint == f"port-kit new some_net --from {source} --repository OWNER/NAME"


def test_a_served_model_needs_no_port(tmp_path: Path) -> None:
    folder = fake_repositories.write(fake_repositories.supported_model(), tmp_path / "some_model")
    done = CliRunner().invoke(main, ["new", "some_port", "--from", str(folder)])
    assert done.exit_code == 1 and "needs no port" in done.output


def test_literals_read_back() -> None:
    value = {"a": [1, 2.5, None], "b": {"c": 'x"y', "d": ()}, "e": ["long" * 9, "words" * 9], "f": (True,)}
    assert eval(literal(value)) == value


def test_templates_hold_no_machine() -> None:
    texts = {path: path.read_text(encoding="utf-8") for path in TEMPLATES.rglob("*.tmpl")}
    assert len(texts) > 25
    machine = (str(Path.home()), str(TEMPLATES.parents[2]))
    assert not [path for path, text in texts.items() if any(place in text for place in machine)]


def test_variants_beside_the_weights_are_left_out(tmp_path: Path) -> None:
    files = fake_repositories.diffusers_model()
    files["vae/diffusion_pytorch_model.fp16.safetensors"] = files["vae/diffusion_pytorch_model.safetensors"]
    folder = fake_repositories.write(files, tmp_path / "model")
    source = Source(ID, inspection=inspect(str(folder)), listed=tuple(files))
    assert file_patterns(source, "vae") == ("vae/config.json", "vae/diffusion_pytorch_model.safetensors")
    assert file_patterns(source, "tokenizer") == ("tokenizer/*",)


def test_git_code_implies_its_path(tmp_path: Path) -> None:
    run = CliRunner().invoke
    options = ["--code", "https://github.com/org/model", "--output-dir", str(tmp_path / "port")]
    assert run(main, ["new", "some_port", "--path", "bypass", *options]).exit_code == 2
    port = NewPort("some_port", "external", tmp_path / "port", code="https://github.com/org/model")
    files = own_files(port)
    assert 'url="https://github.com/org/model"' in files["some_port/recipe.py"]
    assert 'plan="plan.toml"' in files["some_port/__init__.py"]
    assert "tests/test_cache.py" not in files and "tests/test_ranks.py" in files


@pytest.mark.slow
def test_git_code_in_a_folder_below_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan of git code is written by other processes; its path is relative, as those of the other files."""
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, ["new", "some_port", "--path", "external", "--json"])
    assert result.exit_code == 0, result.output
    assert "some_port/plan.toml" in json.loads(result.stdout)["data"]["files"]
