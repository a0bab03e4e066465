"""Cache-DiT on DreamID-Omni: what it saves, and what it changes, over a whole denoising.

The tiny model (random weights, all components, from a loopback Hub) makes a clip without the cache and with it, at
vLLM-Omni's default settings unless others are given. Reported are the seconds of the denoising steps, the share of
transformer blocks that were computed, and the relative error (L2) of the last latents. Prints one JSON object.

    python benchmarks/cache_speed.py                          # a CPU, or the GPU of the machine
    python benchmarks/cache_speed.py --cfg 2 --threshold 0.1  # guidance over two ranks; another threshold
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


class Watch:
    """What one rank notes: when steps end, the last latents, how many blocks were computed."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.latents: tuple[Tensor, Tensor] | None = None
        self.blocks = 0

    def start(self) -> None:
        """Watch the pipelines of this process; what it prints goes to stderr."""
        os.dup2(2, 1)
        from port_kit.models.wan.pipeline.fusion_pipeline import FusionPipeline
        from port_kit.models.wan.transformer.block import FusionBlock

        make, forward = FusionPipeline.__init__, FusionBlock.forward

        def build(pipeline: Any, **options: Any) -> None:
            make(pipeline, **options)
            pipeline.on_step = self.step

        def count(block: Any, *args: Any, **options: Any) -> Any:
            self.blocks += 1
            return forward(block, *args, **options)

        FusionPipeline.__init__, FusionBlock.forward = build, count  # type: ignore[method-assign, assignment]

    def step(self, step: Any) -> None:
        """Note the end of a step; the first of a request starts over."""
        if step.latents["video"].is_cuda:
            torch.cuda.synchronize()
        if step.index == 0:
            self.ends.clear()
        self.ends.append(time.perf_counter())
        self.latents = (step.latents["video"], step.latents["audio"])

    def result(self, _pipeline: nn.Module) -> dict[str, Any]:
        """Return what was noted of the last request."""
        assert self.latents is not None
        return {
            "seconds": self.ends[-1] - self.ends[0],
            "latents": [value.float().cpu() for value in self.latents],
            "blocks": self.blocks,
        }


def run(model: Path, request: Any, options: argparse.Namespace, cache: dict[str, Any] | None) -> dict[str, Any]:
    """Serve the request twice and return what rank 0 noted of the second."""
    from port_kit.testing.workers import run_workers

    config: dict[str, Any] = {"parallel_config": {"cfg_parallel_size": options.cfg}, "dtype": options.dtype}
    if cache is not None:
        config |= {"cache_backend": "cache_dit", "cache_config": cache}
    watch = Watch()
    results = run_workers(
        model, [request, request], config=config, setup=watch.start, probe=watch.result, timeout=options.timeout
    )
    return results[0].probe


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return the L2 distance over the L2 norm."""
    return ((actual - expected).norm() / expected.norm()).item()


def compare(model: Path, request: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Run without and with the cache."""
    settings = {} if options.threshold is None else {"residual_diff_threshold": options.threshold}
    plain, cached = (run(model, request, options, cache) for cache in (None, settings))
    video, audio = (relative_error(a, b) for a, b in zip(cached["latents"], plain["latents"], strict=True))
    return {
        "model": "dreamid_omni, tiny, random weights",
        "steps": options.steps,
        "cfg_parallel_size": options.cfg,
        "settings": settings or "defaults",
        "dtype": options.dtype,
        "seconds": {"plain": round(plain["seconds"], 3), "cached": round(cached["seconds"], 3)},
        "speed_up": round(plain["seconds"] / cached["seconds"], 3),
        "blocks_computed": round(cached["blocks"] / plain["blocks"], 3),
        "relative_error": {"video": video, "audio": audio},
    }


def main() -> None:
    """Parse the options, make the model, print the comparison."""
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # stdout is for the result
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--cfg", type=int, default=1, choices=(1, 2, 4), help="ranks that share the guidance passes")
    parser.add_argument("--threshold", type=float, help="residual_diff_threshold; default: vLLM-Omni's")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32, on a GPU bfloat16")
    parser.add_argument("--size", default="64x64", help="height x width in pixels")
    parser.add_argument("--timeout", type=float, default=1200.0, help="seconds for one run")
    options = parser.parse_args()
    from vllm_omni.platforms import current_omni_platform

    from port_kit.parallel.verify import port_test_case
    from port_kit.registry import find_port

    options.dtype = options.dtype or ("bfloat16" if current_omni_platform.is_cuda() else "float32")
    with tempfile.TemporaryDirectory(prefix="port-kit-") as scratch:
        subject = port_test_case(find_port("dreamid_omni"), Path(scratch))
        height, width = map(int, options.size.split("x"))
        request = subject.requests[0]
        sampling = {**request.sampling, "num_inference_steps": options.steps, "height": height, "width": width}
        print(json.dumps(compare(subject.model, replace(request, sampling=sampling), options), indent=1))


if __name__ == "__main__":
    main()
