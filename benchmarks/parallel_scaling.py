"""One DreamID-Omni step of four branches on several GPUs: seconds, memory and communication of every parallel layout.

The transformer is the published model's (11.66 B parameters, bfloat16) with random weights, which are the same in all
layouts and reach the ranks the way a checkpoint does, HSDP's shards included. Each layout runs in vLLM-Omni's own
workers, one process a GPU; its flows are compared with one GPU's. Seconds are the slowest rank's median of ``--rounds``
after two warm-up rounds. ``peak_bytes`` is the most that PyTorch allocated; ``symm_mem_bytes``, which other ranks of
the host write to (:mod:`port_kit.parallel.comm.symm_mem`), comes on top. The share of communication is measured in one
profiled round: time in NCCL kernels and in copies between GPUs (on a CPU, in gloo's operators) over the time of the
round; it counts where it overlaps with computation too, as copies between GPUs do, and so may exceed 1.
Prints one JSON object.

    python benchmarks/parallel_scaling.py                        # one GPU, then layouts of all GPUs of the machine
    python benchmarks/parallel_scaling.py --layout ulysses2 --layout tp2 --size 480x832
    python benchmarks/parallel_scaling.py --tiny --ranks 2 --rounds 1    # a small model on CPU processes
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # before vLLM is imported: stdout is for the result

import torch
from fusion_step import TINY, inputs
from torch import Tensor, nn
from vllm_omni.diffusion.data import DiffusionOutput, OmniDiffusionConfig
from vllm_omni.diffusion.distributed.utils import get_local_device
from vllm_omni.diffusion.worker.request_batch import DiffusionRequestBatch

from port_kit.parallel.cfg_batching import BatchedCFGMixin

if TYPE_CHECKING:
    from port_kit.testing.workers import PrewarmedRanks

#: What is measured beside one GPU, by the number of GPUs.
LAYOUTS: Mapping[int, tuple[str, ...]] = {
    2: ("cfg2", "ulysses2", "ring2", "tp2", "hsdp2", "hsdp2xcfg2"),
    4: ("cfg4", "ulysses2xcfg2", "ulysses4", "tp2xulysses2", "hsdp4xulysses2xcfg2"),
    8: ("ulysses2xcfg4", "ulysses4xcfg2", "tp2xcfg4"),
}
#: Relative error (L2) of flows that two orders of summation leave.
TOLERANCE = {"bfloat16": 3e-2, "float32": 1e-5}
WARM_UP = 3  # the second round captures CUDA graphs


@dataclass(frozen=True)
class Subject:
    """What is measured.

    Attributes:
        title: of the result.
        module: file of the pipeline's class, without its suffix.
        pipeline: name of the class, a :class:`Measured`.
        configs: returns the ``config.json`` of each component, full-size or tiny.
        size: pixels of the clip by default, height and width.
    """

    title: str
    module: str
    pipeline: str
    configs: Callable[[bool], Mapping[str, Mapping[str, Any]]]
    size: str


class Measured(nn.Module, BatchedCFGMixin):
    """Denoisers alone, in the worker's hands; a request is a measurement."""

    _dit_modules: ClassVar[list[str]] = ["transformer"]
    _encoder_modules: ClassVar[list[str]] = []
    _vae_modules: ClassVar[list[str]] = []
    _resident_modules: ClassVar[list[str]] = []
    dummy_run_num_frames = 0

    def __init__(self, *, od_config: OmniDiffusionConfig, prefix: str = "") -> None:
        from port_kit.pipeline.model_index import read_json

        super().__init__()
        self.od_config = od_config
        self.device = get_local_device()
        parts = [*self._dit_modules, *self._resident_modules]
        self.configs = {name: dict(read_json(od_config.model, f"{name}/config.json")) for name in parts}
        self.build()
        self.eval().requires_grad_(False)

    def build(self) -> None:
        """Set the denoisers and their partners, empty."""
        raise NotImplementedError

    def branches(self, size: tuple[int, int]) -> list[dict[str, Any]]:
        """Return the arguments of each guidance branch, for a clip of ``size`` (height, width) in pixels."""
        raise NotImplementedError

    def fill(self, name: str, shapes: Mapping[str, tuple[int, ...]], rules: Any) -> None:
        """Fill a component with random weights through the loader of checkpoints; ``shapes`` are those of one rank."""
        from port_kit.parallel.hsdp import shard_before_loading
        from port_kit.remap import load_weights

        module = getattr(self, name)
        shard_before_loading(module, self.od_config, self.device, is_root=name in self._dit_modules)
        weights = random_weights(shapes, self.device, self.od_config.dtype, prefix=name)
        load_weights(module, weights, rules, converted=True)

    def combine_multi_branch_cfg_noise(
        self, predictions: list[Any], true_cfg_scale: Any, cfg_normalize: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Weigh the branches unequally, so that a swap would show."""
        video, audio = (torch.stack(streams) for streams in zip(*predictions, strict=True))
        weights = torch.tensor([1.0, -0.5, 0.3, 0.2][: len(predictions)]).to(video)
        return torch.tensordot(weights, video, 1), torch.tensordot(weights, audio, 1)

    def forward(self, req: DiffusionRequestBatch, **_: Any) -> DiffusionOutput:
        """Time the step; return its flows and the figures of this rank."""
        from port_kit.parallel.comm.symm_mem import transfer_stats
        from port_kit.parallel.memory import local_bytes

        given = req.sampling_params.extra_args
        torch.manual_seed(0)
        branches = self.branches(given["size"])

        def step() -> Any:
            return self.predict_noise_with_multi_branch_cfg(True, 1.0, branches)

        loaded = peak_bytes(self.device)
        warm_up = given["warm_up"]
        seconds = [timed(step, self.device) for _ in range(warm_up + given["rounds"])][warm_up:]
        figures = {
            "seconds": statistics.median(seconds),
            "weight_bytes": local_bytes(self),
            "peak_bytes_loading": loaded,
            "peak_bytes": peak_bytes(self.device),
            "symm_mem_bytes": transfer_stats["memory"],
            **profiled(step, self.device, given["kernels"]),
        }
        return DiffusionOutput(output={"flows": [flow.float().cpu() for flow in step()], "figures": figures})


class ScalingPipeline(Measured):
    """The fusion transformer."""

    def build(self) -> None:
        from port_kit.models.wan.transformer.model import build_transformer

        self.transformer = build_transformer(self.configs["transformer"])

    def setup_compile(self) -> None:
        """Use CUDA graphs, as the pipelines of the model do."""
        from port_kit.parallel.cuda_graphs import graphs_are_possible

        if graphs_are_possible(self.od_config):
            self.transformer.use_cuda_graphs(self.device)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Fill the transformer."""
        from port_kit.models.wan.transformer.model import build_transformer
        from port_kit.models.wan.weights.transformer_rules import TRANSFORMER

        shapes = whole_shapes(partial(build_transformer, self.configs["transformer"]), self.od_config.dtype)
        self.fill("transformer", shapes, TRANSFORMER)

    def branches(self, size: tuple[int, int]) -> list[dict[str, Any]]:
        branch = inputs(self.configs["transformer"], *size, self.device, self.od_config.dtype)
        others = [{**branch, "unused": unused} for unused in ("audio", "video")]
        return [branch, {**branch, "timestep": branch["timestep"] - 9}, *others]


def whole_shapes(build: Callable[[], nn.Module], dtype: torch.dtype) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter of a module as one rank alone has it."""
    from port_kit.parallel.meta_init import meta_init

    with meta_init(dtype):
        return {name: tuple(value.shape) for name, value in build().named_parameters()}


def random_weights(
    shapes: Mapping[str, tuple[int, ...]], device: torch.device, dtype: torch.dtype, prefix: str = ""
) -> Iterator[tuple[str, Tensor]]:
    """Yield weights that depend on prefix and name alone, of a scale that keeps activations finite."""
    for name, shape in shapes.items():
        if name.endswith("weight") and len(shape) == 1:
            yield name, torch.ones(shape, device=device, dtype=dtype)
        else:
            generator = torch.Generator(device).manual_seed(zlib.crc32(f"{prefix}{name}".encode()))
            yield name, torch.empty(shape, device=device, dtype=dtype).normal_(std=0.02, generator=generator)


def timed(call: Callable[[], Any], device: torch.device) -> float:
    """Return the seconds of a call, from when all ranks are ready until this one is done."""
    torch.distributed.barrier()
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    """Wait for the device, where there is something to wait for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(device: torch.device) -> int | None:
    """Return the most memory that was allocated so far; None on a CPU, which does not count."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def profiled(call: Callable[[], Any], device: torch.device, kernels: int) -> dict[str, Any]:
    """Return the share of a round's time that this rank spends in collectives, and its longest kernels on a GPU."""
    from torch.profiler import ProfilerActivity, profile

    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as seen:
        seconds = timed(call, device)
    marks, field = (("nccl", "memcpy ptop"), "self_device_time_total") if on_gpu else (("gloo:",), "cpu_time_total")
    spent = {event.key: (getattr(event, field), event.count) for event in seen.key_averages()}
    longest = sorted(spent.items(), key=lambda item: -item[1][0])[:kernels]
    return {
        "communication": sum(time for name, (time, _) in spent.items() if any(mark in name.lower() for mark in marks))
        / 1e6
        / seconds,
        "kernels": [[name[:90], round(time / 1e3, 2), count] for name, (time, count) in longest],
    }


def register(module: str, pipeline: str) -> None:
    """Register a pipeline in a worker, which imports its file by its name."""
    from vllm_omni.diffusion.registry import register_diffusion_model

    os.dup2(2, 1)  # stdout is for the result
    sys.path.insert(0, str(Path(__file__).parent))
    register_diffusion_model(model_arch=pipeline, module_name=module, class_name=pipeline)


def fusion_configs(tiny: bool) -> dict[str, dict[str, Any]]:
    """Return the configuration of the fusion transformer."""
    from port_kit.models.wan.transformer.config import TRANSFORMER_CONFIG

    sizes = TINY if tiny else {}
    config = dict(TRANSFORMER_CONFIG)
    config |= {tower: {"text_dim": 4096, **config[tower], **sizes} for tower in ("video", "audio")}
    return {"transformer": config}


def write_model(folder: Path, subject: Subject, *, tiny: bool) -> None:
    """Write a model directory without weights."""
    for name, config in subject.configs(tiny).items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config))
    index = {"_class_name": subject.pipeline, "_diffusers_version": "0.40.0"}
    (folder / "model_index.json").write_text(json.dumps(index))


def measure(
    model: Path, layout: str, subject: Subject, options: argparse.Namespace, prewarmed: PrewarmedRanks | None = None
) -> tuple[list[Tensor], dict[str, Any]]:
    """Run a layout; return rank 0's flows and the figures of all ranks."""
    from port_kit.parallel.layout import Layout
    from port_kit.testing.workers import Request, run_workers

    parsed = Layout.parse(layout)
    config = {
        "parallel_config": parsed.parallel_config,
        "dtype": options.dtype,
        "enforce_eager": options.eager,
    }
    given = {name: getattr(options, name) for name in ("size", "rounds", "warm_up", "kernels")}
    given["size"] = tuple(map(int, options.size.split("x")))
    request = Request("measure", {"extra_args": given, "seed": 0})
    setup = partial(register, subject.module, subject.pipeline)
    results = run_workers(model, [request], config=config, setup=setup, timeout=options.timeout, prewarmed=prewarmed)
    figures = [result.outputs[0]["figures"] for result in results]
    return results[0].outputs[0]["flows"], {
        "ranks": parsed.world,
        "seconds": round(max(one["seconds"] for one in figures), 5),
        "weight_bytes": [one["weight_bytes"] for one in figures],
        "peak_bytes_loading": [one["peak_bytes_loading"] for one in figures],
        "peak_bytes": [one["peak_bytes"] for one in figures],
        "symm_mem_bytes": [one["symm_mem_bytes"] for one in figures],
        "communication": [round(one["communication"], 4) for one in figures],
        **({"kernels_rank_0": figures[0]["kernels"]} if options.kernels else {}),
    }


def difference(flows: list[Tensor], expected: list[Tensor], tolerance: float) -> dict[str, Any]:
    """Compare flows with one GPU's: the larger relative error (L2) of the two."""
    error = max(((a - b).norm() / b.norm()).item() for a, b in zip(flows, expected, strict=True))
    return {"relative_error": error, "within_tolerance": error <= tolerance}


def run(subject: Subject, options: argparse.Namespace) -> dict[str, Any]:
    """Measure one rank and every layout that was asked for or fits the machine."""
    from port_kit.errors import ParallelError
    from port_kit.parallel.layout import Layout
    from port_kit.testing.workers import PrewarmedRanks

    layouts = options.layout or [name for count in (2, 4, 8) if count <= options.ranks for name in LAYOUTS[count]]
    tolerance = TOLERANCE[options.dtype]
    # On GPUs every layout has processes of its own: they import while others are measured, on cores of the host.
    ahead = 0 if options.tiny else sum(Layout.parse(name).world for name in ("single", *layouts))
    with tempfile.TemporaryDirectory(prefix="port-kit-") as scratch, closing(PrewarmedRanks(ahead)) as prewarmed:
        model = Path(scratch)
        write_model(model, subject, tiny=options.tiny)
        expected, single = measure(model, "single", subject, options, prewarmed)
        rows = {"single": single}
        print(json.dumps(rows), file=sys.stderr, flush=True)
        for layout in layouts:
            try:
                flows, row = measure(model, layout, subject, options, prewarmed)
            except ParallelError as error:
                rows[layout] = {"error": str(error)[-2000:]}
                print(json.dumps({layout: rows[layout]}), file=sys.stderr, flush=True)
                continue
            rows[layout] = {
                **row,
                "speed_up": round(single["seconds"] / row["seconds"], 3),
                "weight_share": round(max(row["weight_bytes"]) / single["weight_bytes"][0], 4),
                **difference(flows, expected, tolerance),
            }
            print(json.dumps({layout: rows[layout]}), file=sys.stderr, flush=True)
    return {
        "model": "tiny" if options.tiny else subject.title,
        "size": options.size,
        "dtype": options.dtype,
        "rounds": options.rounds,
        "devices": options.ranks,
        "tolerance": tolerance,
        "layouts": rows,
    }


def main(subject: Subject, description: str | None) -> None:
    """Parse the options, measure, print."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layout", action="append", help="as in port-kit verify parallel; may be given several times")
    parser.add_argument("--ranks", type=int, help="default: the GPUs of the machine, with --tiny 2")
    parser.add_argument("--size", metavar="HEIGHTxWIDTH", help=f"pixels; default: {subject.size}, with --tiny 64x64")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warm-up", type=int, default=WARM_UP, help="rounds before them")
    parser.add_argument("--eager", action="store_true", help="without CUDA graphs")
    parser.add_argument("--tiny", action="store_true", help="a small model in float32 on CPU processes")
    parser.add_argument(
        "--kernels", type=int, default=0, help="list so many of rank 0's kernels: name, ms in a step, launches"
    )
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds for one layout")
    options = parser.parse_args()
    options.size = options.size or ("64x64" if options.tiny else subject.size)
    options.dtype = "float32" if options.tiny else "bfloat16"
    options.ranks = options.ranks or (2 if options.tiny else torch.cuda.device_count())
    print(json.dumps(run(subject, options), indent=1))


if __name__ == "__main__":
    main(Subject("11.66 B parameters", Path(__file__).stem, "ScalingPipeline", fusion_configs, "704x1024"), __doc__)
