"""A user's script: run one request of a hosted pipeline through ``Omni`` per layout, and write what came out.

Usage: run_hosted.py MODEL CLASS SPEC.json REPORT.npz LAYOUT...   with LAYOUT like ``cfg2`` or ``single``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np


def media(result: Any) -> dict[str, np.ndarray]:
    """Return the media of one result as arrays."""
    found = {f"image{index}": np.asarray(image) for index, image in enumerate(result.images)}
    audio = result.multimodal_output.get("audio")
    return found if audio is None else {**found, "audio": np.asarray(audio)}


def run(model: str, class_name: str, spec: dict[str, Any], layout: str) -> dict[str, np.ndarray]:
    """Start an engine, run the request, and stop it."""
    from vllm_omni import Omni
    from vllm_omni.diffusion.data import DiffusionParallelConfig
    from vllm_omni.inputs.data import OmniDiffusionSamplingParams

    from port_kit.parallel.layout import Layout

    parallel = DiffusionParallelConfig(**Layout.parse(layout).parallel_config)
    omni = Omni(
        model=model,
        model_class_name=class_name,
        dtype="float32",
        enforce_eager=True,
        parallel_config=parallel,
        additional_config=spec.get("additional_config"),
    )
    try:
        parameters = OmniDiffusionSamplingParams(
            seed=3, output_type="np", extra_args=spec["arguments"], **spec["sampling"]
        )
        prompt = {"prompt": "a red cat on a mat"}
        if spec["negative"] is not None:
            prompt["negative_prompt"] = spec["negative"]
        return media(omni.generate(prompt, parameters)[0])
    finally:
        omni.close()


if __name__ == "__main__":
    specification = json.loads(Path(sys.argv[3]).read_text(encoding="utf-8"))
    arrays = {}
    for name in sys.argv[5:]:
        for key, value in run(sys.argv[1], sys.argv[2], specification, name).items():
            arrays[f"{name}/{key}"] = value
    np.savez(sys.argv[4], **arrays)
