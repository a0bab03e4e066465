"""Tiny models and requests of ``port-kit verify parallel`` for the ports of this family.

Each request has one step, because guidance amplifies rounding and a second step would start from different latents.
Predictions of the transformer must agree to 5e-6. Guidance multiplies the difference by up to 13, and the vocoder with
random weights near its full scale amplifies it further, hence :data:`OUTPUT_TOLERANCE`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from port_kit.parallel.verify import ParallelTestCase
from port_kit.port import resolve
from port_kit.registry import find_port
from port_kit.testing.tiny_fusion import download_tiny
from port_kit.testing.workers import Request

OUTPUT_TOLERANCE = 5e-3
#: Samples at 16 kHz; the model uses seconds 1 to 2.
REFERENCE_AUDIO_SAMPLES = 33_000
_SAMPLING = {"num_inference_steps": 1, "seed": 11}


def dreamid_omni_subject(scratch: Path) -> ParallelTestCase:
    """Return DreamID-Omni's tiny model and a request with one reference image and one reference audio."""
    audio = (0.1 * np.random.default_rng(1).standard_normal(REFERENCE_AUDIO_SAMPLES)).astype(np.float32)
    media = {"image": [Image.new("RGB", (60, 40), (200, 30, 90))], "audio": [audio]}
    prompt = {"prompt": "one person sings", "multi_modal_data": media}
    return _subject("dreamid_omni", scratch, Request(prompt, {"height": 64, "width": 64, **_SAMPLING}))


def ovi_subject(scratch: Path) -> ParallelTestCase:
    """Return Ovi's tiny model and a request with a first frame."""
    image = Image.new("RGB", (96, 64), (200, 30, 90))
    prompt = {"prompt": "rain on a roof. Audio: rain", "multi_modal_data": {"image": image}}
    return _subject("ovi", scratch, Request(prompt, dict(_SAMPLING)))


def _subject(port: str, scratch: Path, request: Request) -> ParallelTestCase:
    recipe: Any = resolve(find_port(port).recipe)
    report = download_tiny(recipe, scratch / "tiny")
    return ParallelTestCase(Path(report.directory), [request], output_tolerance=OUTPUT_TOLERANCE)
