"""The goldens' tiny models as model directories, assembled from their original repositories' layout."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers import only_in

collect_ignore = only_in("0.32", "test_skip_layers_protocol.py")


@pytest.fixture(scope="session")
def dreamid_model(goldens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DreamID-Omni, made with the recipe's own file rules and conversion; float32 positions, as recorded."""
    from port_kit.models.wan.parity.pipeline_cases import RunRecording, assemble

    recording = RunRecording.read(goldens / "e2e_dreamid")
    return assemble(goldens, tmp_path_factory.mktemp("models") / "tiny", recording.record)


@pytest.fixture(scope="session")
def ovi_model(goldens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ovi, made with the recipe's own file rules and conversion; frames of 4096 pixels, as recorded."""
    from port_kit.models.wan.parity.pipeline_cases import RunRecording, assemble
    from port_kit.models.wan.parity.recorded_runs import OVI_T2V

    recording = RunRecording.read(goldens / OVI_T2V.folder)
    return assemble(goldens, tmp_path_factory.mktemp("models") / "ovi", recording.record, OVI_T2V)
