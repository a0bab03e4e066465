"""A port of an inspected model: two repositories, wrapped pickles, known components, the git code."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from port_kit.cli import main
from port_kit.download import Recipe
from port_kit.remap import RuleSet
from port_kit.testing.forkserver import run_forked
from tests.scaffold.found_models import EXTRAS, NET, SHAPES, served
from tests.scaffold.helpers import environment

NAME = "found_net"


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a new port."""
    folder = tmp_path_factory.mktemp("found")
    with served(folder) as (hub, _), pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_PROXY", "127.0.0.1,localhost")
        patch.setenv("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")
        code = (folder / "git" / "code").as_uri()
        given = ["--path", "custom", "--output", "audio", "--from", NET, "--from", EXTRAS, "--code", code]
        target = ["--endpoint", hub.endpoint, "--output-dir", str(folder / "port")]
        done = CliRunner().invoke(main, ["new", NAME, *given, *target])
    assert done.exit_code == 0, done.output
    return folder / "port"


def test_the_recipe_has_every_file_and_the_code(port: Path) -> None:
    code = f"import dataclasses, json; from {NAME}.recipe import RECIPE; "
    code += "print(json.dumps(dataclasses.asdict(RECIPE)))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=port, env=environment(PYTHONPATH=str(port)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    recipe = Recipe.from_dict(json.loads(done.stdout))
    patterns = {item.repo_id: [rule.pattern for rule in item.files] for item in recipe.repositories}
    assert patterns == {
        NET: ["weights/net-*-of-00002.pt", "bpe/tokenizer.json", "bpe/tokenizer_config.json"],
        EXTRAS: ["umt5.safetensors", "wan_vae.pth", "discriminator/encoder.pt"],
    }
    assert all(item.revision for item in recipe.repositories)
    assert recipe.licences["transformer"] == "mit" and recipe.licences["vocoder"] == "cc-by-4.0"
    (git,) = recipe.code
    assert git.commit and git.packages == ("some_net_code",)
    assert recipe.configs["vocoder"]["upsample_initial_channel"] == 1536
    assert recipe.configs["audio_vae"]["hidden_dim"] == 384


def test_the_configuration_is_that_of_the_class(port: Path) -> None:
    """Its keys are the constructor's parameters, its layers those of the tensors; the latents are left open."""
    text = (port / NAME / "config.py").read_text()
    assert 'TRANSFORMER_CONFIG: Mapping[str, Any] = {\n    "depth": 12,\n}\n' in text
    assert "def latent_channels() -> int:" in text
    assert "config.latent_channels()" in (port / NAME / "pipeline.py").read_text()


def test_nothing_is_invented(port: Path) -> None:
    assert json.loads((port / NAME / "transformer.json").read_text()).keys() == {f"module.{name}" for name in SHAPES}
    for part in ("transformer", "umt5"):
        assert len(RuleSet.from_file(port / NAME / f"{part}.toml")) == 0
    assert not (port / "original").exists()
    text = "\n".join(path.read_text() for path in port.rglob("*") if path.is_file() and path.suffix != ".pyc")
    assert "your-org" not in text and "demo.mp4" not in text and "of-00002.log" not in text


def test_its_tests_name_what_is_left_to_do(port: Path) -> None:
    """The recipe, the containers and the known components work at once; rules wait for the module."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "complete or published"]
    done = run_forked(command, cwd=port, timeout=600, PATH=environment()["PATH"])
    assert "2 failed, 1 passed" in done.stdout, done.stdout[-4000:] + done.stderr[-2000:]
    for part in ("transformer", "umt5"):
        listed = port / NAME / f"{part}.json"
        files = f"--source {listed} -o {listed.with_suffix('.toml')}"
        assert f"port-kit rules suggest --port {NAME} --component {part} {files}" in done.stdout
