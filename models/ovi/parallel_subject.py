"""What ``port-kit verify parallel ovi`` runs: the tiny checkpoint, a first frame and a prompt, one step.

One step, because guidance enlarges what the first leaves of rounding, and the second starts from there.
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from port_kit.models.ovi.recipe import RECIPE
from port_kit.parallel.verify import ParallelTestCase
from port_kit.testing.tiny_fusion import download_tiny
from port_kit.testing.workers import Request

#: Flows must agree to 5e-6. One step takes what guidance makes of the rest, up to 8 times as much, to the latents
#: whole, and a vocoder of random weights, near its full scale, to the audio.
OUTPUT_TOLERANCE = 5e-3


def tiny_subject(scratch: Path) -> ParallelTestCase:
    """Download the tiny model from a loopback Hub into ``scratch``, and return it with a request."""
    report = download_tiny(RECIPE, scratch / "tiny")
    image = Image.new("RGB", (96, 64), (200, 30, 90))
    prompt = {"prompt": "rain on a roof. Audio: rain", "multi_modal_data": {"image": image}}
    request = Request(prompt, {"num_inference_steps": 1, "seed": 11})
    return ParallelTestCase(Path(report.directory), [request], output_tolerance=OUTPUT_TOLERANCE)
