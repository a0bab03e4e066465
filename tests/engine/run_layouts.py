"""A user's script: start ``Omni`` once per layout, send one request, and record the result or the error.

Usage: run_layouts.py MODEL FOLDER LAYOUT...   FOLDER gets ``<layout>.json`` and the reports of the ranks.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image

#: All branches contribute, and guidance does not amplify their differences or rounding errors.
GUIDANCE = {
    f"{name}_cfg_scale": scale
    for name, scale in {"video": 1.1, "audio": 1.1, "video_ref": 0.1, "audio_ref": 0.1}.items()
}


def request(report: Path) -> tuple[Any, Any]:
    """A prompt with one reference image and audio, and its parameters; ranks report to the path ``report``."""
    from vllm_omni.inputs.data import OmniDiffusionSamplingParams

    samples = (0.1 * np.random.default_rng(1).standard_normal(33_000)).astype(np.float32)
    media = {"image": [Image.new("RGB", (60, 40), (200, 30, 90))], "audio": [samples]}
    extra = {"report": str(report), **GUIDANCE}
    sampling = OmniDiffusionSamplingParams(height=64, width=64, num_inference_steps=1, seed=11, extra_args=extra)
    return {"prompt": "one person sings", "multi_modal_data": media}, sampling


def run(model: str, folder: Path, layout: str) -> dict[str, Any]:
    """Start an engine, serve the request, stop the engine."""
    from vllm_omni import Omni

    from port_kit.parallel.layout import Layout

    omni = Omni(model=model, dtype="float32", enforce_eager=True, **engine_options(Layout, layout))
    try:
        (result,) = omni.generate(*request(folder / layout))
        workers = count_workers()
    finally:
        omni.close()
    frames = np.asarray(result.images[0]).astype(np.int64)
    audio = np.asarray(result.multimodal_output["audio"]).astype(np.float64)
    np.savez(folder / f"{layout}.npz", frames=frames, audio=audio)
    return {"workers": workers}


def engine_options(layout_class: Any, layout: str) -> dict[str, Any]:
    """``ulysses2``, or ``ulysses2+cache_dit`` for a layout with a cache."""
    degrees, _, cache = layout.partition("+")
    options = dict(layout_class.parse(degrees).parallel_config)
    return {**options, "cache_backend": cache} if cache else options


def count_workers() -> int:
    """Processes that this one has started and that are alive, without those of :mod:`multiprocessing` itself."""
    own = psutil.Process()
    helpers = ("resource_tracker", "forkserver")

    def helps(child: psutil.Process) -> bool:
        return child.ppid() == own.pid and any(name in " ".join(child.cmdline()) for name in helpers)

    return sum(not helps(child) for child in own.children(recursive=True))


def refusal(error: BaseException) -> dict[str, Any]:
    """Describe why an engine did not start: the error, and the kit's own among its causes."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    known = next((link for link in chain if hasattr(link, "code") and hasattr(link, "hint")), None)
    return {
        "type": type(error).__name__,
        "text": str(error),
        "code": getattr(known, "code", ""),
        "hint": getattr(known, "hint", ""),
        "details": getattr(known, "details", {}),
        "workers": count_workers(),
    }


def main(model: str, folder: str, *layouts: str) -> None:
    """Try every layout."""
    for layout in layouts:
        try:
            outcome = run(model, Path(folder), layout)
        except (RuntimeError, ValueError) as error:
            outcome = {"refused": refusal(error)}
        Path(folder, f"{layout}.json").write_text(json.dumps(outcome))


if __name__ == "__main__":
    main(*sys.argv[1:])
