"""The goldens' tiny DreamID-Omni as a model directory, assembled from its original repositories' layout."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def dreamid_model(goldens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory made with the recipe's own file rules and conversion; float32 positions, as recorded."""
    from port_kit.models.wan_fusion.golden_pipeline import Recording, assemble

    recording = Recording.read(goldens / "e2e_dreamid")
    return assemble(goldens, tmp_path_factory.mktemp("models") / "tiny", recording.record)
