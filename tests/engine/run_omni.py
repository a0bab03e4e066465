"""A user's script: start ``Omni`` on a model directory, once per layout, and write the results as JSON lines.

Usage: run_omni.py MODEL REPORT LAYOUT...   with LAYOUT like ``ring_degree=2`` or ``single``. The report is a file,
because an engine that runs in this process puts a prefix before everything that is printed.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np


def describe(result: Any) -> dict[str, Any]:
    """Reduce one answer to numbers: shapes, digests, types."""
    video, sound = np.asarray(result.images[0]), np.asarray(result.multimodal_output["audio"])
    return {
        "final_output_type": result.final_output_type,
        "video_shape": video.shape,
        "video_sum": float(video.astype(np.float64).sum()),
        "video_std": float(video.std()),
        "sound_shape": sound.shape,
        "sound_sum": float(sound.astype(np.float64).sum()),
        "fps": result.multimodal_output["fps"],
        "audio_sample_rate": result.multimodal_output["audio_sample_rate"],
    }


def run(model: str, layout: str) -> dict[str, Any]:
    """Start an engine, send a good, a failing and again a good request, and stop it."""
    from vllm_omni import Omni
    from vllm_omni.inputs.data import OmniDiffusionSamplingParams
    from vllm_omni.platforms import current_omni_platform

    degrees = {} if layout == "single" else {name: int(n) for name, n in [layout.split("=")]}
    omni = Omni(model=model, dtype="float32", enforce_eager=True, **degrees)
    try:
        parameters = OmniDiffusionSamplingParams(num_inference_steps=2, seed=3)
        report = describe(omni.generate("a cat", parameters)[0])
        report["failure"] = _failure(omni, parameters)
        report["again"] = describe(omni.generate("a cat", parameters)[0])
        report["platform"] = type(current_omni_platform).__name__
        report["stage_types"] = [stage.final_output_type for stage in omni.engine.stage_configs]
    finally:
        omni.close()
    return {"layout": layout, **report}


def _failure(omni: Any, parameters: Any) -> str:
    """Send a request that fails; as a generator, because a failing list closes the engine."""
    try:
        list(omni.generate("fail", parameters, py_generator=True))
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


if __name__ == "__main__":
    with open(sys.argv[2], "w", encoding="utf-8") as file:
        for name in sys.argv[3:]:
            file.write(json.dumps(run(sys.argv[1], name)) + "\n")
