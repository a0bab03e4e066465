"""Ports of a model with two transformers and modules that they call, from a folder in MOVA's layout."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from port_kit.cli import main
from port_kit.testing.forkserver import run_forked
from tests.inspect.mova_repository import hide_names, write_mova
from tests.scaffold.helpers import environment

NAME = "two_towers"
REPOSITORY = "some-lab/two-towers"
#: Prints what the package declares.
DUMP = f"""
import dataclasses, json
from {NAME} import PORT
from {NAME}.recipe import RECIPE
from {NAME}.weights import COMPONENTS, PRETRAINED
parts = {{part.name: [part.kind, part.build, part.rules, part.config] for part in COMPONENTS}}
known = {{part.name: part.source for part in PRETRAINED}}
folders = sorted({{rule.folder for repository in RECIPE.repositories for rule in repository.files}})
print(json.dumps({{"parts": parts, "known": known, "folders": folders, "index": RECIPE.model_index,
                  "configs": {{name: dict(values) for name, values in RECIPE.configs.items()}}}}))
"""


def new(source: Path, folder: Path) -> Path:
    """Write a port of a folder."""
    given = ["--path", "custom", "--from", str(source), "--repository", REPOSITORY, "--output-dir", str(folder)]
    done = CliRunner().invoke(main, ["new", NAME, *given])
    assert done.exit_code == 0, done.output
    return folder


def declared(port: Path) -> dict[str, Any]:
    """Return what the package declares, imported in a process of its own."""
    command = [sys.executable, "-c", DUMP]
    done = subprocess.run(command, cwd=port, env=environment(PYTHONPATH=str(port)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A port of MOVA itself, in other sizes than the published ones."""
    folder = tmp_path_factory.mktemp("known")
    return new(write_mova(folder / "source"), folder / "port")


@pytest.fixture(scope="module")
def unknown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A port of a model with this layout whose towers and bridge no port has."""
    folder = tmp_path_factory.mktemp("unknown")
    root = write_mova(folder / "source")
    hide_names(root)
    return new(root, folder / "port")


FOLDERS = ["audio_vae", "scheduler", "text_encoder", "tokenizer", "transformer", "transformer_2", "video_vae"]
LIBRARIES = {"text_encoder": "transformers:UMT5EncoderModel", "video_vae": "diffusers:AutoencoderKLWan"}


def test_known_components_are_wired(known: Path) -> None:
    found = declared(known)
    assert found["known"] == LIBRARIES
    assert found["folders"] == sorted([*FOLDERS, "audio_transformer", "bridge"])
    kinds = {name: kind for name, (kind, *_) in found["parts"].items()}
    assert kinds == {
        "transformer": "transformer",
        "transformer_2": "transformer",
        "audio_transformer": "partner",
        "bridge": "partner",
        "audio_vae": "vae",
    }
    for name, (_, build, rules, _) in found["parts"].items():
        assert build.startswith("port_kit.models.mova.model."), name
        assert rules.startswith("port_kit.models.mova.weights:"), name
    assert found["index"]["boundary_ratio"] == 0.9
    assert found["configs"]["transformer"]["dim"] == 96 and found["configs"]["bridge"]["visual_layers"] == 3
    assert not list((known / NAME).glob("*.toml")), "the rules are those of the port"
    text = (known / NAME / "pipeline.py").read_text()
    assert "NoiseExperts(0.9)" in text and "EXPERT: self.experts.at(" in text
    assert "self.video_vae.decode(" in text


@pytest.mark.slow
def test_the_rules_of_known_components_cover_the_folder(known: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_coverage.py"]
    done = run_forked(command, cwd=known, timeout=600, PATH=environment()["PATH"])
    assert done.returncode == 0 and "5 passed" in done.stdout, done.stdout[-4000:] + done.stderr[-2000:]


def test_unknown_components_are_named_and_left_to_do(unknown: Path) -> None:
    found = declared(unknown)
    assert found["known"] == LIBRARIES
    assert found["folders"] == sorted([*FOLDERS, "audio_dit", "dual_tower_bridge"])
    first, second = found["parts"]["transformer"], found["parts"]["transformer_2"]
    assert first == second, "weights of its own, and nothing else"
    assert first[1] == f"{NAME}.model.transformer:build_transformer"
    assert {name: found["parts"][name][0] for name in ("audio_dit", "dual_tower_bridge", "audio_vae")} == {
        "audio_dit": "partner",
        "dual_tower_bridge": "partner",
        "audio_vae": "vae",
    }
    assert found["parts"]["audio_vae"][1].startswith("port_kit.models.mova.model.audio_vae:")
    listed = {path.stem for path in (unknown / NAME).glob("*.toml")}
    assert listed == {"transformer", "audio_dit", "dual_tower_bridge"}
    assert listed == {path.stem for path in (unknown / NAME / "model").glob("*.py")} - {"__init__"}
    assert found["configs"]["transformer_2"] == found["configs"]["transformer"]
    rows = (unknown / "README.md").read_text()
    assert "that of `transformer`, with weights of its own" in rows
    assert rows.count("called by the transformer") == 2
