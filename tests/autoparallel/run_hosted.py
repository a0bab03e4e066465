"""A user's script: run the request of a tiny pipeline through ``Omni`` per layout, and write what came out.

Usage: run_hosted.py PIPELINE FOLDER REPORT.npz PLAN LAYOUT...   with PLAN a file or ``-``, LAYOUT like ``cfg2``, or
``cache_dit@0.0`` for Cache-DiT with a threshold, without warm-up.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

from port_kit.autoparallel.host.checks import PLAN_KEY
from port_kit.autoparallel.host.index import PipelineIndex
from port_kit.autoparallel.tiny_pipelines import CASES
from port_kit.parallel.cached_layout import split_cache
from port_kit.runtime.hosts import host_of


def media(result: Any) -> dict[str, np.ndarray]:
    """Return the media of one result as arrays."""
    found = {f"image{index}": np.asarray(image) for index, image in enumerate(result.images)}
    audio = result.multimodal_output.get("audio")
    return found if audio is None else {**found, "audio": np.asarray(audio)}


def cache_options(cached: bool, threshold: str) -> dict[str, Any]:
    """Return the engine's options of the cache."""
    if not cached:
        return {}
    settings = {"max_warmup_steps": 0, "max_continuous_cached_steps": -1, "residual_diff_threshold": float(threshold)}
    return {"cache_backend": "cache_dit", "cache_config": settings}


def run(name: str, folder: str, plan: str, text: str) -> dict[str, np.ndarray]:
    """Start an engine, run the request, and stop it."""
    from vllm_omni import Omni
    from vllm_omni.diffusion.data import DiffusionParallelConfig
    from vllm_omni.inputs.data import OmniDiffusionSamplingParams

    named, _, threshold = text.partition("@")
    cached, layout = split_cache(named)
    omni = Omni(
        model=folder,
        model_class_name=host_of(PipelineIndex.read(folder).output_type),
        dtype="float32",
        enforce_eager=True,
        parallel_config=DiffusionParallelConfig(**layout.parallel_config),
        additional_config={} if plan == "-" else {PLAN_KEY: plan},
        **cache_options(cached, threshold),
    )
    try:
        prompt, sampling = CASES[name].request()
        results = [omni.generate(prompt, OmniDiffusionSamplingParams(**sampling))[0] for _ in range(2 if cached else 1)]
        return media(results[-1])  # a second request must not see the cache of the first
    finally:
        omni.close()


if __name__ == "__main__":
    pipeline, directory, report, plan_file, *layouts = sys.argv[1:]
    arrays = {}
    for each in layouts:
        for key, value in run(pipeline, directory, plan_file, each).items():
            arrays[f"{each}/{key}"] = value
    np.savez(Path(report), **arrays)
