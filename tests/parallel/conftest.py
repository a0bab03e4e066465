"""The goldens' fusion checkpoint as a model directory of a pipeline of the transformer alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from port_kit.parallel.layout import Layout
from port_kit.parallel.verify import ParallelTestCase
from port_kit.testing.workers import RankResult, Request
from tests.helpers import only_in
from tests.parallel import transformer_pipeline
from tests.parallel.transformer_pipeline import GOLDENS, INPUTS, write_model

collect_ignore = only_in("0.32", "test_pre_sharded.py")


@pytest.fixture(scope="session")
def transformer_model(goldens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "probe"
    towers = json.loads((goldens / "SET.json").read_text())["fusion"]
    rope = {"family": "dreamid_omni", "freqs_scaling": {"num": 31, "den": 157, "dtype": "float32"}}
    transformer = write_model(folder, "TransformerOnlyPipeline", {**towers, "rope": rope})
    shutil.copy(next((goldens / "ckpts/DreamID_Omni").glob("*.safetensors")), transformer / "model.safetensors")
    return folder


@pytest.fixture(scope="session")
def dreamid_model(goldens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The goldens' tiny DreamID-Omni, all components, as a model directory."""
    from port_kit.models.wan.parity.pipeline_cases import RunRecording, assemble

    recording = RunRecording.read(goldens / "e2e_dreamid")
    return assemble(goldens, tmp_path_factory.mktemp("models") / "tiny", recording.record)


@pytest.fixture(scope="session")
def subject(transformer_model: Path, goldens: Path) -> ParallelTestCase:
    given = [*INPUTS, *({"golden": str(goldens / "fusion" / name)} for name in GOLDENS)]
    requests = [Request("probe", {"num_inference_steps": 1, "seed": 1, "extra_args": extra}) for extra in given]
    return ParallelTestCase(transformer_model, requests, setup=lambda _world: transformer_pipeline.register())


@pytest.fixture(scope="session")
def single(subject: ParallelTestCase) -> RankResult:
    """The run on one rank that all others are compared with."""
    return subject.run(Layout())[0]
