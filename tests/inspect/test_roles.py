"""Components that belong together: MOVA's repository, with tiny widths, as a folder and on a Hub."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from port_kit.inspect import Inspection, inspect
from port_kit.testing.hub import Hub
from tests.inspect.mova_repository import DENOISERS, INDEX, hide_names, write_mova


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mova(tmp_path_factory.mktemp("mova"))


@pytest.fixture(scope="module")
def report(root: Path) -> Inspection:
    return inspect(str(root))


def facts(report: Inspection) -> str:
    return "\n".join(finding.fact for finding in report.evidence)


def test_each_component_is_named(report: Inspection) -> None:
    known = {part.name: part.class_name for part in report.components if part.known and part.weights}
    assert known == {"text_encoder": "UMT5EncoderModel", "video_vae": "AutoencoderKLWan"}
    recognized = {part.name: part.recognized for part in report.components if part.recognized}
    assert {name: (found.port, found.name, found.kind) for name, found in recognized.items()} == {
        "video_dit": ("mova", "transformer", "transformer"),
        "video_dit_2": ("mova", "transformer", "transformer"),
        "audio_dit": ("mova", "audio_transformer", "partner"),
        "dual_tower_bridge": ("mova", "bridge", "partner"),
        "audio_vae": ("mova", "audio_vae", "vae"),
    }
    assert report.path == "hybrid" and report.class_name == "MOVA"


def test_the_towers_and_what_they_call_are_one_model(report: Inspection) -> None:
    assert (
        "video_dit and video_dit_2 have the same tensors and weights of their own: "
        "boundary_ratio 0.9 of model_index.json is the noise below which video_dit_2 runs"
    ) in facts(report)
    assert "audio_dit, dual_tower_bridge, video_dit and video_dit_2 are what denoises in the port mova" in facts(report)
    assert report.memory is not None and sorted(report.memory.sharded) == list(DENOISERS)


def test_without_a_boundary_nothing_is_said_about_noise(root: Path, tmp_path: Path) -> None:
    index = {name: entry for name, entry in INDEX.items() if name not in ("boundary_ratio", "audio_dit")}
    for name in ("video_dit", "video_dit_2", "dual_tower_bridge"):
        shutil.copytree(root / name, tmp_path / name)
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    found = facts(inspect(str(tmp_path)))
    assert "video_dit and video_dit_2 have the same tensors and weights of their own\n" in f"{found}\n"
    assert "what denoises in the port" not in found, "there is no audio tower"


def test_unknown_towers_are_paired_by_their_tensors(tmp_path: Path) -> None:
    root = write_mova(tmp_path)
    hide_names(root)
    report = inspect(str(root))
    assert [part.name for part in report.components if part.recognized] == ["audio_vae"]
    assert "video_dit and video_dit_2 have the same tensors" in facts(report)
    assert "what denoises" not in facts(report)


@pytest.mark.parametrize(("variant", "command"), [("720p", "mova"), ("360p", "mova --variant 360p")])
def test_each_published_checkpoint_has_its_download(variant: str, command: str, root: Path) -> None:
    files = {path.relative_to(root).as_posix(): path for path in root.rglob("*") if path.is_file()}
    repository = f"OpenMOSS-Team/MOVA-{variant}"
    with Hub({repository: files}) as hub:
        report = inspect(repository, endpoint=hub.endpoint, token=False)
    assert report.next == f"port-kit download {command}"
    assert "becomes the transformer of the port mova" in facts(report)
