"""The goldens' fusion checkpoint as a model directory of the probe pipeline."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from port_kit.parallel.layout import Layout
from port_kit.parallel.verify import ParallelTestCase
from port_kit.testing.workers import RankResult, Request
from tests.parallel import probe_pipeline

#: Recorded passes of the original; the first one's frequency scaling is the model's.
GOLDENS = ("dreamid_one_ref_odd", "dreamid_two_refs", "dreamid_padded", "dreamid_no_refs")
#: Video and audio tokens of each: odd, shorter than the ranks, and with references and a clean first frame.
INPUTS = (
    {"grid": (31, 2, 2), "sounds": 7},
    {"grid": (7, 2, 2), "sounds": 31},
    {"grid": (31, 2, 2), "sounds": 2},
    {"grid": (4, 6, 10), "sounds": 25, "pictures": 1, "voices": (4, 3), "first_frame_clean": True},
)


@pytest.fixture(scope="session")
def probe_model(goldens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "probe"
    (folder / "transformer").mkdir(parents=True)
    towers = json.loads((goldens / "SET.json").read_text())["fusion"]
    rope = {"family": "dreamid_omni", "freqs_scaling": {"num": 31, "den": 157, "dtype": "float32"}}
    (folder / "transformer/config.json").write_text(json.dumps({**towers, "rope": rope}))
    (folder / "model_index.json").write_text(
        json.dumps({"_class_name": "ProbePipeline", "_diffusers_version": "0.40.0"})
    )
    shutil.copy(next((goldens / "ckpts/DreamID_Omni").glob("*.safetensors")), folder / "transformer/model.safetensors")
    return folder


@pytest.fixture(scope="session")
def dreamid_model(goldens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The goldens' tiny DreamID-Omni, all components, as a model directory."""
    from port_kit.models.wan.parity.pipeline_cases import RunRecording, assemble

    recording = RunRecording.read(goldens / "e2e_dreamid")
    return assemble(goldens, tmp_path_factory.mktemp("models") / "tiny", recording.record)


@pytest.fixture(scope="session")
def subject(probe_model: Path, goldens: Path) -> ParallelTestCase:
    given = [*INPUTS, *({"golden": str(goldens / "fusion" / name)} for name in GOLDENS)]
    requests = [Request("probe", {"num_inference_steps": 1, "seed": 1, "extra_args": extra}) for extra in given]
    return ParallelTestCase(probe_model, requests, setup=lambda _world: probe_pipeline.register())


@pytest.fixture(scope="session")
def single(subject: ParallelTestCase) -> RankResult:
    """The run on one rank that all others are compared with."""
    return subject.run(Layout())[0]
