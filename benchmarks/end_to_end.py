"""A whole request, phase by phase: load, encode text and references, denoise, decode video and sound, save.

DreamID-Omni at full size with random weights of every component (a model directory of about 38 GB is written first),
or its tiny model, on one rank of vLLM-Omni's own worker. After a warm-up request and ``--rounds`` requests of a few
steps, one of ``--steps`` steps is served. Seconds of encoding, decoding and of a step are medians over the requests
after the warm-up; each phase has its own peak of device memory (on a CPU, of resident host memory). ``--cache`` serves
the same request once more with Cache-DiT at vLLM-Omni's default settings, and says how far the last latents are from
those without. Prints one JSON object.

    python benchmarks/end_to_end.py --height 704 --width 1024 --cache --folder /scratch/model
    python benchmarks/end_to_end.py --height 480 --width 832 --steps 10 --tiling --eager --folder /scratch/model
    python benchmarks/end_to_end.py --decode-only --kernels            # the decoders alone, in their forms
    python benchmarks/end_to_end.py --tiny                                                # a minute, on a CPU
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import Any

from full_size import OUTLINES, make_component

WORDS = "one person walks along the harbour at dusk and sings quietly while boats move in the wind behind them "
#: Where each phase's work is, from the pipeline: the phase and the call.
PHASES = {
    "encode_text": "encode_prompt",
    "encode_picture": "vae.encode",
    "encode_voice": "audio_vae.encode",
    "decode_video": "vae.decode",
    "decode_audio": "audio_vae.decode",
    "vocode": "vocoder.forward",
}


class Watch:
    """What one rank notes of every request; its functions run in the rank's process.

    Args:
        counts: count the transformer's blocks; not where they are compiled, since counting would be compiled too.
        profiled: a phase whose kernels are listed, of its first call after the warm-up.
        cudnn_benchmark: let cuDNN try its algorithms for each shape of a convolution.
        memory_gb: device memory that the process may use; 0 for all.
    """

    def __init__(
        self, *, counts: bool, profiled: str | None = None, cudnn_benchmark: bool = False, memory_gb: float = 0.0
    ) -> None:
        self.counts, self.profiled, self.cudnn_benchmark = counts, profiled, cudnn_benchmark
        self.memory_gb = memory_gb
        self.kernels: list[dict[str, Any]] = []
        self.requests: list[dict[str, Any]] = []
        self.load: dict[str, Any] = {}
        self.latents: tuple[Any, Any] | None = None
        self.blocks = 0

    def start(self) -> None:
        """Watch the pipeline that this process is going to build; what libraries print goes to stderr."""
        os.dup2(2, 1)
        import torch

        from port_kit.models.wan.transformer.block import FusionBlock
        from port_kit.pipeline import base as module

        torch.backends.cudnn.benchmark = self.cudnn_benchmark
        if self.memory_gb:
            share = self.memory_gb * 1e9 / torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(min(share, 1.0))
        kind: Any = module.PortPipeline
        block: Any = FusionBlock
        make, forward, run = kind.__init__, kind.forward, block.forward

        def build(pipeline: Any, **options: Any) -> None:
            make(pipeline, **options)
            pipeline.on_step = self.step
            for phase, path in PHASES.items():
                *owners, name = path.split(".")
                owner = pipeline.get_submodule(".".join(owners))
                setattr(owner, name, self.timed(phase, getattr(owner, name)))
            pipeline.predict = self.timed("predict", pipeline.predict)

        def serve(pipeline: Any, *args: Any, **options: Any) -> Any:
            self.requests.append({})
            self.blocks = 0
            output = self.timed("request", forward)(pipeline, *args, **options)
            output.output = self.timed("to_host", to_host)(output.output)
            return output

        def count(*args: Any, **options: Any) -> Any:
            self.blocks += 1
            return run(*args, **options)

        kind.__init__, kind.forward = build, serve
        if self.counts:
            block.forward = count
        kind.load_weights = self.timed("load_weights", kind.load_weights)
        module.to_frames = self.timed("to_frames", module.to_frames)

    def timed(self, phase: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """Note the seconds and the memory of each call; memory only of calls that hold no other phase."""

        @wraps(call)
        def run(*args: Any, **options: Any) -> Any:
            if phase == self.profiled and len(self.requests) == 2 and not self.kernels:
                return self.profile(lambda: call(*args, **options))
            synchronize()
            holds_others = phase == "request"
            if not holds_others:
                reset_peak()
            start = time.perf_counter()
            result = call(*args, **options)
            synchronize()
            entry = (time.perf_counter() - start, None if holds_others else peak_bytes())
            notes = self.requests[-1] if self.requests else self.load
            notes.setdefault(phase, []).append(entry)
            return result

        return run

    def profile(self, call: Callable[[], Any], shown: int = 30) -> Any:
        """Run a call under torch's profiler, and note its kernels, the longest first."""
        import torch
        from torch.profiler import ProfilerActivity, profile

        on_gpu = torch.cuda.is_available()
        with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiled:
            result = call()
            synchronize()
        spent = "self_device_time_total" if on_gpu else "self_cpu_time_total"
        events = sorted(profiled.key_averages(), key=lambda event: -getattr(event, spent))
        self.kernels = [
            {"kernel": event.key[:110], "calls": event.count, "ms": round(getattr(event, spent) / 1e3, 3)}
            for event in events[:shown]
        ]
        return result

    def step(self, step: Any) -> None:
        """Keep the last latents."""
        self.latents = (step.latents["video"], step.latents["audio"])

    def result(self, pipeline: Any) -> dict[str, Any]:
        """Return what was noted."""
        import torch

        assert self.latents is not None
        on_gpu = torch.cuda.is_available()
        return {
            "load": self.load,
            "requests": self.requests,
            "latents": [value.float().cpu().numpy() for value in self.latents],
            "blocks": self.blocks,
            "kernels": self.kernels,
            "parameters": {name: sum(p.numel() for p in part.parameters()) for name, part in pipeline.named_children()},
            "weights_bytes": sum(p.nbytes for p in pipeline.parameters()),
            "device": torch.cuda.get_device_name() if on_gpu else "cpu",
            "torch": torch.__version__,
        }


def synchronize() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def reset_peak() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))


def to_host(output: Any) -> Any:
    return {name: value.cpu() for name, value in output.items()} if isinstance(output, dict) else output


# -- serving --------------------------------------------------------------------------------------------------------


def serve(
    model: Path,
    given: argparse.Namespace,
    cache: bool,
    *,
    engine: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
    few_options: Mapping[str, Any] | None = None,
    memory_gb: float = 0.0,
) -> dict[str, Any]:
    """Serve the requests on one rank; returns what the rank noted, and the last output.

    Args:
        model: the model directory.
        given: arguments of the command.
        cache: with Cache-DiT.
        engine: further fields of the engine's configuration.
        options: ``extra_args`` of the last request.
        few_options: of the requests of a few steps.
        memory_gb: device memory that the rank may use; 0 for all.
    """
    from port_kit.testing.workers import run_workers

    config: dict[str, Any] = {
        "dtype": given.dtype,
        "enforce_eager": given.eager,
        "vae_use_tiling": given.tiling,
        "vae_fast_path": given.vae_fast_path,
        "parallel_config": {},
        **(engine or {}),
    }
    if cache:
        config |= {"cache_backend": "cache_dit", "cache_config": {}}
    few = min(given.round_steps, given.steps)
    steps = [few] * (1 + (0 if cache else given.rounds)) + [given.steps]
    requests = [request(given, count, number, few_options) for number, count in enumerate(steps)]
    requests[-1] = request(given, given.steps, 0, options)
    profiled = None if cache else given.profile
    watch = Watch(counts=given.eager, profiled=profiled, cudnn_benchmark=given.cudnn_benchmark, memory_gb=memory_gb)
    (rank,) = run_workers(model, requests, config=config, setup=watch.start, probe=watch.result, timeout=given.timeout)
    return {**rank.probe, "load_seconds": rank.load_seconds, "output": rank.outputs[-1]}


def request(given: argparse.Namespace, steps: int, number: int, options: Mapping[str, Any] | None = None) -> Any:
    """Return a request with one picture and one voice; each number has a prompt of its own."""
    import numpy
    from PIL import Image

    from port_kit.testing.workers import Request

    random = numpy.random.default_rng(1)
    voice = (0.1 * random.standard_normal(40_000)).astype(numpy.float32)
    picture = Image.fromarray(random.integers(0, 255, (given.height, given.width, 3), dtype=numpy.uint8))
    prompt = {"prompt": f"{WORDS * 4}{number}", "multi_modal_data": {"image": [picture], "audio": [voice]}}
    sampling = {"height": given.height, "width": given.width, "num_inference_steps": steps, "seed": 11}
    sampling["extra_args"] = dict(options or {})
    return Request(prompt, sampling)


def save(output: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Write the MP4 as the server would; where PyAV is a stand-in that only imports, say so."""
    import av

    from port_kit.models.wan.pipeline.request import AUDIO_SAMPLE_RATE, FPS
    from port_kit.pipeline.media import to_omni_payload, write_mp4

    if not isinstance(getattr(av, "library_versions", None), dict):
        return {"skipped": "PyAV here is a stand-in that only imports"}
    start = time.perf_counter()
    payload = to_omni_payload(output, fps=FPS, sample_rate=AUDIO_SAMPLE_RATE)["payload"]
    path = write_mp4(folder / "clip.mp4", payload["video"], payload["audio"], fps=FPS, sample_rate=AUDIO_SAMPLE_RATE)
    return {"seconds": round(time.perf_counter() - start, 3), "bytes": path.stat().st_size}


# -- the report -----------------------------------------------------------------------------------------------------


def phases(served: dict[str, Any]) -> dict[str, Any]:
    """Medians of each phase's seconds in a request, after the warm-up, and its highest peak."""
    rows = {}
    for phase in [*PHASES, "to_frames", "to_host"]:
        calls = [one[phase] for one in served["requests"][1:] if phase in one]
        if calls:
            seconds = statistics.median(sum(second for second, _ in each) for each in calls)
            rows[phase] = {
                "seconds": round(seconds, 4),
                "calls": len(calls[0]),
                "peak_gib": gib(max(peak for each in calls for _, peak in each)),
                "first_seconds": round(sum(second for second, _ in served["requests"][0][phase]), 4),
            }
    return rows


def denoising(served: dict[str, Any]) -> dict[str, Any]:
    """Seconds of the last request's steps; a step is the four branches, their guidance and the solver's update."""
    steps = served["requests"][-1]["predict"]
    seconds = [second for second, _ in steps]
    return {
        "steps": len(steps),
        "seconds": round(sum(seconds), 3),
        "step_ms": round(statistics.median(seconds) * 1e3, 2),
        "first_step_ms": round(seconds[0] * 1e3, 2),
        "warm_up_step_ms": round(served["requests"][0]["predict"][0][0] * 1e3, 2),
        "peak_gib": gib(max(peak for _, peak in steps)),
        "request_seconds": round(served["requests"][-1]["request"][0][0], 3),
    }


def gib(size: int) -> float:
    return round(size / 2**30, 3)


def run(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Write the model where it is missing, serve, and report."""
    written = write_missing(folder, given)
    plain = serve(folder, given, cache=False)
    print(json.dumps({"denoise": denoising(plain), "phases": phases(plain)}), file=sys.stderr, flush=True)
    ((load_seconds, load_peak),) = plain["load"]["load_weights"]
    result = {
        "model": f"dreamid_omni, {'tiny' if given.tiny else 'full size'}, random weights",
        "device": plain["device"],
        "torch": plain["torch"],
        "size": f"{given.height}x{given.width}",
        "dtype": given.dtype,
        "compiled": not given.eager,
        "tiling": given.tiling,
        "vae_fast_path": given.vae_fast_path,
        "cudnn_benchmark": given.cudnn_benchmark,
        "rounds": given.rounds,
        "parameters": plain["parameters"],
        "written": written,
        "load": {
            "weights_seconds": round(load_seconds, 3),
            "weights_bytes": plain["weights_bytes"],
            "worker_seconds": round(plain["load_seconds"], 3),
            "peak_gib": gib(load_peak),
        },
        "phases": phases(plain),
        "denoise": denoising(plain),
    }
    with tempfile.TemporaryDirectory() as scratch:
        result["save"] = save(plain["output"], Path(scratch))
    if given.profile:
        result["kernels"] = plain["kernels"]
    if given.cache:
        result["cache_dit"] = compare(serve(folder, given, cache=True), plain)
    return result


def write_missing(folder: Path, given: argparse.Namespace) -> dict[str, Any] | None:
    """Write the model where it is missing, in a process of its own; return what that took."""
    if (folder / "model_index.json").is_file():
        return None
    command = [sys.executable, __file__, "--write", "--folder", str(folder), "--layers", str(given.layers)]
    done = subprocess.run([*command, *(["--tiny"] if given.tiny else [])], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"writing the model failed with exit code {done.returncode}")
    written: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return written


def compare(cached: dict[str, Any], plain: dict[str, Any]) -> dict[str, Any]:
    """What the cache saves, and what it changes."""
    row = denoising(cached)
    return {
        "settings": "vLLM-Omni's defaults",
        **row,
        "speed_up": round(denoising(plain)["seconds"] / row["seconds"], 3),
        "blocks_computed": round(cached["blocks"] / plain["blocks"], 3) if plain["blocks"] else None,
        "relative_error": errors(cached["latents"], plain["latents"]),
    }


def errors(latents: Any, expected: Any) -> dict[str, float]:
    """Return the relative error (L2) of the latents of each modality."""
    import numpy

    pairs = zip(("video", "audio"), latents, expected, strict=True)
    return {name: float(numpy.linalg.norm(one - other) / numpy.linalg.norm(other)) for name, one, other in pairs}


def write(folder: Path, *, tiny: bool, layers: int) -> dict[str, Any]:
    """Write the model directory; ``model_index.json`` last, so that one that is there is whole."""
    import torch

    from port_kit.models.dreamid_omni.recipe import RECIPE
    from port_kit.testing.tokenizer import write_tokenizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    start, total = time.perf_counter(), 0
    for name in OUTLINES:
        total += make_component(
            folder / name,
            name,
            tiny=tiny,
            device=device,
            dtype="bfloat16" if name == "transformer" else "",
            layers=layers if name == "transformer" else 0,
        )
    (folder / "tokenizer").mkdir()
    write_tokenizer(folder / "tokenizer")
    (folder / "model_index.json").write_text(json.dumps(RECIPE.model_index))
    return {"bytes": total, "seconds": round(time.perf_counter() - start, 2)}


def add_defaults(given: argparse.Namespace) -> None:
    """Set what the command line left out."""
    from vllm_omni.platforms import current_omni_platform

    given.eager = given.eager or not current_omni_platform.is_cuda()
    given.height = given.height or (64 if given.tiny else 704)
    given.width = given.width or (64 if given.tiny else 1024)
    given.steps = given.steps or (8 if given.tiny else 50)
    given.dtype = given.dtype or ("float32" if given.tiny else "bfloat16")


def decode_alone(given: argparse.Namespace) -> dict[str, Any]:
    """Measure the decoders without a model directory."""
    import decode_only

    return decode_only.run(
        given.height or (64 if given.tiny else 704),
        given.width or (64 if given.tiny else 1024),
        latent_frames=given.latent_frames,
        rounds=given.rounds,
        forms=given.form,
        tiny=given.tiny,
        kernels=given.kernels,
    )


def build_parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--folder", type=Path, help="a model directory to keep; used as it is if it is there")
    options.add_argument("--height", type=int, help="pixels; default: 704, tiny: 64")
    options.add_argument("--width", type=int, help="pixels; default: 1024, tiny: 64")
    options.add_argument("--steps", type=int, help="of the last request; default: 50, tiny: 8")
    options.add_argument("--rounds", type=int, default=5, help="requests of a few steps, for the medians")
    options.add_argument("--round-steps", type=int, default=2, help="steps of those")
    options.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16, tiny: float32")
    options.add_argument("--layers", type=int, default=0, help="fewer layers of the transformer than 30")
    options.add_argument("--eager", action="store_true", help="no compilation; always so on a CPU")
    options.add_argument("--tiling", action="store_true", help="the video decoder works on tiles")
    options.add_argument("--vae-fast-path", choices=("off", "lossless", "channels_last"), default="lossless")
    options.add_argument("--cudnn-benchmark", action="store_true", help="cuDNN tries its algorithms for each shape")
    options.add_argument("--profile", choices=(*PHASES, "predict"), help="list the kernels of one call of this phase")
    options.add_argument("--cache", action="store_true", help="once more with Cache-DiT")
    options.add_argument("--tiny", action="store_true", help="the tiny model")
    options.add_argument("--timeout", type=float, default=1800.0, help="seconds for one worker")
    options.add_argument("--write", action="store_true", help="only write the model directory")
    options.add_argument("--decode-only", action="store_true", help="the decoders alone, in all their forms")
    options.add_argument("--form", action="append", default=[], help="with --decode-only: only this form")
    options.add_argument("--latent-frames", type=int, default=31, help="with --decode-only")
    options.add_argument("--kernels", action="store_true", help="with --decode-only: where the time goes")
    return options


def main() -> None:
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # stdout is for the result
    options = build_parser()
    given = options.parse_args()
    if given.decode_only:
        print(json.dumps(decode_alone(given), indent=1))
        return
    if given.write:
        if given.folder is None:
            options.error("--write needs --folder")
        print(json.dumps(write(given.folder, tiny=given.tiny, layers=given.layers)))
        return
    add_defaults(given)
    with tempfile.TemporaryDirectory(prefix="port-kit-") as scratch:
        print(json.dumps(run(given, given.folder or Path(scratch) / "model"), indent=1))


if __name__ == "__main__":
    main()
