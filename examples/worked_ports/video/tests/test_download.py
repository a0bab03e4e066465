"""The recipe: a loopback Hub's repository becomes a whole model directory."""

from __future__ import annotations

import json
from pathlib import Path

from driftwood import PORT


def test_the_tiny_model_is_complete(model: Path) -> None:
    index = json.loads((model / "model_index.json").read_text(encoding="utf-8"))
    assert index["_class_name"] == PORT.class_name
    for component in PORT.components:
        assert list((model / component.name).glob("*.safetensors")), component.name
