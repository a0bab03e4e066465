"""A user's script: run the request of a tiny pipeline through ``Omni`` per layout, and write what came out.

Usage: run_hosted.py PIPELINE FOLDER REPORT.npz PLAN LAYOUT...   with PLAN a file or ``-``, LAYOUT like ``cfg2``, or
``cache_dit@0.0`` for Cache-DiT with a threshold, without warm-up.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

from port_kit.autoparallel.tiny_pipelines import CASES
from port_kit.autoparallel.tiny_pipelines.engine import Generated, generate
from port_kit.parallel.cached_layout import split_cache


def cache_options(threshold: str) -> dict[str, Any]:
    """Return the engine's options of the cache."""
    settings = {"max_warmup_steps": 0, "max_continuous_cached_steps": -1, "residual_diff_threshold": float(threshold)}
    return {"cache_backend": "cache_dit", "cache_config": settings}


def run(name: str, folder: str, plan: str, text: str) -> Generated:
    """Run the request of a pipeline in a layout."""
    named, _, threshold = text.partition("@")
    cached, layout = split_cache(named)
    options = cache_options(threshold) if cached else {}
    requests = 2 if cached else 1  # a second request must not see the cache of the first
    return generate(folder, CASES[name].request(), layout, None if plan == "-" else plan, requests=requests, **options)


if __name__ == "__main__":
    pipeline, directory, report, plan_file, *layouts = sys.argv[1:]
    arrays = {}
    for each in layouts:
        for key, value in run(pipeline, directory, plan_file, each).media.items():
            arrays[f"{each}/{key}"] = value
    np.savez(Path(report), **arrays)
