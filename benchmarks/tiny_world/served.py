"""Clips of the world from vLLM-Omni's engine: one engine makes the clips of several rows and scores them in memory.

``benchmarks/quality.py`` starts this module once per engine: ``python -m benchmarks.tiny_world.served JOB DESCRIPTOR``.
``JOB`` is a JSON file (:class:`Job`). One JSON line per row goes to the file descriptor, since engines write to stdout.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.tiny_world.clips import FRAMES, HEIGHT, RATE, SAMPLES, WIDTH
from benchmarks.tiny_world.grammar import Description, held_back
from benchmarks.tiny_world.scores import Measured, measure, share

#: Seed of the first measured clip; that of clip i is larger by i. The warm-up clip has the one before.
SEED = 1000
EXACT = "exact"


@dataclass(frozen=True)
class Request:
    """What the requests of a row set.

    Attributes:
        name: of the row.
        steps: of the denoising.
        options: ``extra_args``.
        lora: PEFT folder; empty for none.
    """

    name: str
    steps: int
    options: dict[str, Any] = field(default_factory=dict)
    lora: str = ""


@dataclass(frozen=True)
class Job:
    """The rows of one engine.

    Attributes:
        engine: arguments of ``Omni``.
        ranks: GPUs that it needs.
        rows: as :class:`Request`.
        prompts: clips per row.
        warm_up: clips before those of a row.
        frames: folder for kept frames: those of the row ``exact``, with which the other rows are compared.
    """

    engine: dict[str, Any]
    ranks: int
    rows: list[dict[str, Any]]
    prompts: int
    warm_up: int
    frames: str


class Watch:
    """Counters of an engine of one rank, which runs in this process.

    Attributes:
        denoising: seconds from the end of the encoding to the start of the decoding, per request.
        decisions: of Cache-DiT, one per transformer call of a branch: whether the cached blocks were skipped.
        skipped: share of the blocks that such a call skips.
    """

    def __init__(self) -> None:
        self.denoising: list[float] = []
        self.decisions: list[bool] = []
        self.skipped = 0.0
        self._began = 0.0

    def start(self) -> None:
        """Watch the pipeline that is going to be built."""
        from cache_dit.caching.cache_contexts.cache_manager import CachedContextManager

        from port_kit.pipeline.base import PortPipeline

        kind, manager = PortPipeline, CachedContextManager
        begin, finish, decide = kind.begin, kind.postprocess, manager.can_cache

        def begun(pipeline: Any, *args: Any) -> Any:
            states = begin(pipeline, *args)
            self._began = now()
            blocks = len(pipeline.transformer.blocks)
            cache = pipeline.od_config.cache_config
            self.skipped = (blocks - cache.Fn_compute_blocks - cache.Bn_compute_blocks) / blocks
            return states

        def finished(pipeline: Any, *args: Any) -> Any:
            self.denoising.append(now() - self._began)
            return finish(pipeline, *args)

        def decided(contexts: Any, *args: Any, **options: Any) -> bool:
            self.decisions.append(bool(decide(contexts, *args, **options)))
            return self.decisions[-1]

        kind.begin, kind.postprocess, manager.can_cache = begun, finished, decided  # type: ignore[method-assign]

    def clear(self) -> None:
        """Forget the warm-up."""
        self.denoising.clear()
        self.decisions.clear()

    def figures(self) -> dict[str, Any]:
        """Return what was counted; nothing of an engine with workers of its own."""
        found: dict[str, Any] = {}
        if self.denoising:
            found["denoise_seconds"] = round(statistics.median(self.denoising), 4)
        if self.decisions:
            found["reuse"] = round(self.skipped * sum(self.decisions) / len(self.decisions), 4)
        return found


def now() -> float:
    """Return the time after all work of the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def to_clip(frames: Any, audio: Any, rate: int) -> tuple[Tensor, Tensor]:
    """Return an engine's output as scores take it.

    Args:
        frames: uint8 ``[F, H, W, 3]``.
        audio: float samples, ``[S]`` or ``[1, S]``.
        rate: samples per second.

    Raises:
        ValueError: the output has not the form of a clip of the world.
    """
    video, wave = np.asarray(frames), np.asarray(audio, dtype=np.float32).reshape(-1)
    found = (video.shape, str(video.dtype), wave.shape, rate)
    expected = ((FRAMES, HEIGHT, WIDTH, 3), "uint8", (SAMPLES,), RATE)
    if found != expected:
        raise ValueError(f"the engine's clip is {found}; expected {expected}")
    pixels = torch.from_numpy(video.copy()).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    return pixels, torch.from_numpy(wave.copy())[None]


def make_clip(omni: Any, request: Request, prompt: str, seed: int, lora: str) -> Any:
    """Return the engine's result for one prompt."""
    from vllm_omni.inputs.data import OmniDiffusionSamplingParams
    from vllm_omni.lora.request import LoRARequest

    adapter = {"lora_request": LoRARequest("white", 1, lora), "lora_scale": 1.0} if lora else {}
    sampling = OmniDiffusionSamplingParams(
        height=HEIGHT,
        width=WIDTH,
        num_inference_steps=request.steps,
        seed=seed,
        extra_args=dict(request.options),
        **adapter,
    )
    (result,) = omni.generate({"prompt": prompt}, sampling, py_generator=True, use_tqdm=False)
    return result


def new_colour(count: int) -> list[Description]:
    """Return descriptions of the colour that a LoRA teaches, without those of its training."""
    from benchmarks.tiny_world.lora import prompts  # it imports the model, which the start of the command need not

    return prompts()[1][:count]


class Rows:
    """Makes and scores the clips of rows with one engine."""

    def __init__(self, omni: Any, watch: Watch, job: Job) -> None:
        self.omni, self.watch, self.job = omni, watch, job

    def row(self, request: Request) -> dict[str, Any]:
        """Return the figures of a row; one with a LoRA is scored without it, too."""
        given = new_colour(self.job.prompts) if request.lora else held_back(self.job.prompts)
        found: dict[str, Any] = {"name": request.name, "prompts": len(given)}
        if not request.lora:
            return found | self.clips(request, given, "", keep=request.name == EXACT, kept=EXACT)
        found["scores_without_lora"] = self.clips(request, given, "", keep=True, kept=request.name)["scores"]
        return found | self.clips(request, given, request.lora, keep=False, kept=request.name)

    def clips(
        self, request: Request, given: Sequence[Description], lora: str, *, keep: bool, kept: str
    ) -> dict[str, Any]:
        """Make a clip of each description, and return the figures.

        Args:
            request: of all clips.
            given: the descriptions.
            lora: PEFT folder; empty for none.
            keep: keep the frames instead of comparing them with those that were kept.
            kept: name of the kept frames.
        """
        for _ in range(self.job.warm_up):
            make_clip(self.omni, request, given[0].prompt(), SEED - 1, lora)
        self.watch.clear()
        seconds, peaks, found, differences = [], [0.0], list[Measured](), list[float]()
        for index, description in enumerate(given):
            began = time.perf_counter()
            result = make_clip(self.omni, request, description.prompt(), SEED + index, lora)
            seconds.append(time.perf_counter() - began)
            peaks.append(result.peak_memory_mb)
            media = result.multimodal_output
            found += measure(*to_clip(result.images[0], media["audio"], media["audio_sample_rate"]))
            path = Path(self.job.frames, f"{kept} {index}.npy")
            differences += compare(np.asarray(result.images[0]), path, keep=keep)
        peak = {"peak_gib": round(max(peaks) / 1024, 3)} if torch.cuda.is_available() else {}
        difference = {"difference": round(statistics.mean(differences), 3)} if differences else {}
        return {
            "scores": {name: round(value, 4) for name, value in share(found, given).items()},
            "steps": request.steps,
            "seconds": round(statistics.median(seconds), 4),
            **self.watch.figures(),
            **peak,
            **difference,
        }


def compare(frames: Any, path: Path, *, keep: bool) -> list[float]:
    """Return the mean difference from kept frames in grey levels, if there are any; or keep these."""
    if keep:
        np.save(path, frames)
        return []
    return [float(np.abs(frames.astype(np.int16) - np.load(path)).mean())] if path.is_file() else []


def reason(error: BaseException) -> str:
    """Return the last line of an error, and the hint after it if there is one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    count = 2 if lines[-1].startswith("hint:") else 1
    return f"{type(error).__name__}: {'; '.join(lines[-count:])}"[:400]


def check_devices(ranks: int) -> None:
    """Raise RuntimeError if this machine has GPUs, but fewer than ranks."""
    if 0 < torch.cuda.device_count() < ranks:
        raise RuntimeError(f"the row needs {ranks} GPUs, this machine has {torch.cuda.device_count()}")


def run(job: Job, report: Any) -> None:
    """Start the engine, and report each row as soon as it is known."""
    requests = [Request(**row) for row in job.rows]

    def fail(names: Sequence[str], error: BaseException) -> None:
        traceback.print_exception(error)
        for name in names:
            print(json.dumps({"name": name, "failed": reason(error)}), file=report, flush=True)

    try:
        check_devices(job.ranks)
        from vllm_omni import Omni

        watch = Watch()
        watch.start()
        omni = Omni(**job.engine)
    except Exception as error:
        fail([request.name for request in requests], error)
        return
    try:
        rows = Rows(omni, watch, job)
        for request in requests:
            try:
                print(json.dumps(rows.row(request)), file=report, flush=True)
            except Exception as error:
                fail([request.name], error)
    finally:
        omni.close()


if __name__ == "__main__":
    with os.fdopen(int(sys.argv[2]), "w", encoding="utf-8") as lines:
        run(Job(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))), lines)
