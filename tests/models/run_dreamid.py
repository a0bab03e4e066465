"""A user's script: one ``Omni`` on a model directory, requests that must be refused, then good ones.

Usage: run_dreamid.py MODEL REPORT. Each request adds a JSON line to the report: its result and duration.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

GOOD: dict[str, Any] = {"height": 64, "width": 96, "num_inference_steps": 2, "seed": 3}


def requests() -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Yield (name, prompt, sampling fields)."""
    image = Image.new("RGB", (50, 70), (90, 120, 60))
    audio = (0.1 * np.random.default_rng(0).standard_normal(40_000)).astype(np.float32)
    media = {"image": [image, image], "audio": [audio, (audio, 16_000)]}
    good = {"prompt": "two people talk", "multi_modal_data": media}

    def with_media(**change: Any) -> dict[str, Any]:
        return {**good, "multi_modal_data": {**media, **change}}

    yield "good before", good, GOOD
    yield "no images", with_media(image=[]), GOOD
    yield "no audio", {"prompt": "talk", "multi_modal_data": {"image": [image]}}, GOOD
    yield "text only", "two people talk", GOOD
    yield "unequal counts", with_media(image=[image]), GOOD
    yield "size", good, {**GOOD, "height": 100}
    yield "zero steps", good, {**GOOD, "num_inference_steps": 0}
    yield "negative steps", good, {**GOOD, "num_inference_steps": -2}
    yield "long prompt", {**good, "prompt": "x" * 10_000}, GOOD
    yield "corrupt image", with_media(image=[b"\x89PNG\r\n\x1a\n broken", image]), GOOD
    yield "missing file", with_media(audio=["nowhere.wav", audio]), GOOD
    yield "short audio", with_media(audio=[audio, audio[:20_000]]), GOOD
    yield "wrong type", with_media(image=[3, 4]), GOOD
    yield "scale", good, {**GOOD, "extra_args": {"audio_cfg_scale": float("nan")}}
    yield "misspelt", good, {**GOOD, "extra_args": {"vidio_cfg_scale": 2.0}}
    yield "good after", good, GOOD


def answer(omni: Any, prompt: Any, sampling: dict[str, Any]) -> dict[str, Any]:
    """Send one request as a list call: one that is refused must leave the engine open."""
    from vllm_omni.inputs.data import OmniDiffusionSamplingParams

    started = time.perf_counter()
    try:
        (result,) = omni.generate(prompt, OmniDiffusionSamplingParams(**sampling))
    except (ValueError, RuntimeError) as error:
        status = getattr(error, "status_code", None)
        outcome = {"error": str(error), "type": type(error).__name__, "status": status}
    else:
        video, audio = np.asarray(result.images[0]), np.asarray(result.multimodal_output["audio"])
        outcome = {
            "type": result.final_output_type,
            "video": video.shape,
            "dtype": str(video.dtype),
            "video_sum": int(video.astype(np.int64).sum()),
            "audio": audio.shape,
            "audio_sum": float(audio.astype(np.float64).sum()),
            "fps": result.multimodal_output["fps"],
            "rate": result.multimodal_output["audio_sample_rate"],
        }
    return {**outcome, "seconds": time.perf_counter() - started}


def main(model: str, report: str) -> None:
    """Run all requests against one engine."""
    from vllm_omni import Omni

    omni = Omni(model=model, dtype="float32", enforce_eager=True)
    try:
        with open(report, "w", encoding="utf-8") as file:
            for name, prompt, sampling in requests():
                file.write(json.dumps({"name": name, **answer(omni, prompt, sampling)}) + "\n")
                file.flush()
    finally:
        omni.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
