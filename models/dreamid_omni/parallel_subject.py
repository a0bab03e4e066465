"""What ``port-kit verify parallel dreamid_omni`` runs: the tiny checkpoint, one image, one reference audio, one step.

One step, because guidance enlarges what the first leaves of rounding, and the second starts from there.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from port_kit.models.dreamid_omni.recipe import RECIPE
from port_kit.parallel.verify import ParallelTestCase
from port_kit.testing.tiny_fusion import download_tiny
from port_kit.testing.workers import Request

#: Samples of 16 kHz: two seconds and a little, of which the model hears the second one.
REFERENCE_AUDIO_SAMPLES = 33_000
#: Flows must agree to 5e-6. Guidance multiplies what rounding leaves of them by up to 13, one step takes it to the
#: latents whole, and a vocoder of random weights, near its full scale, to the audio: 1e-3 was seen on audio of scale 1.
OUTPUT_TOLERANCE = 5e-3


def tiny_subject(scratch: Path) -> ParallelTestCase:
    """Download the tiny model from a loopback Hub into ``scratch``, and return it with a request."""
    report = download_tiny(RECIPE, scratch / "tiny")
    return ParallelTestCase(Path(report.directory), [_request()], output_tolerance=OUTPUT_TOLERANCE)


def _request() -> Request:
    audio = (0.1 * np.random.default_rng(1).standard_normal(REFERENCE_AUDIO_SAMPLES)).astype(np.float32)
    media = {"image": [Image.new("RGB", (60, 40), (200, 30, 90))], "audio": [audio]}
    prompt = {"prompt": "one person sings", "multi_modal_data": media}
    return Request(prompt, {"height": 64, "width": 64, "num_inference_steps": 1, "seed": 11})
