"""Tidepool's sizes, and what a request may set."""

from __future__ import annotations

from typing import Any

#: Content of ``transformer/config.json``. ``patch`` is (frames, rows, columns); widths are in channels.
TRANSFORMER_CONFIG: dict[str, Any] = {
    "dim": 64,
    "heads": 4,
    "layers": 2,
    "ffn_dim": 256,
    "patch": [1, 8, 8],
}
FRAMES, HEIGHT, WIDTH = 9, 48, 64  # pixels
FPS = 8  # frames a second
DEFAULT_STEPS = 8
DEFAULT_GUIDANCE = 3.0
BYTES = 256  # the prompt is read as UTF-8
