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


class ScalingPipeline(nn.Module, BatchedCFGMixin):
    """The transformer alone, in the worker's hands; a request is a measurement."""

    _dit_modules: ClassVar[list[str]] = ["transformer"]
    _encoder_modules: ClassVar[list[str]] = []
    _vae_modules: ClassVar[list[str]] = []
    _resident_modules: ClassVar[list[str]] = []
    dummy_run_num_frames = 0

    def __init__(self, *, od_config: OmniDiffusionConfig, prefix: str = "") -> None:
        from port_kit.models.wan.transformer.model import build_transformer
        from port_kit.pipeline.model_index import read_json

        super().__init__()
        self.od_config = od_config
        self.device = get_local_device()
        self.config = dict(read_json(od_config.model, "transformer/config.json"))
        self.transformer = build_transformer(self.config)
        self.eval().requires_grad_(False)

    def setup_compile(self) -> None:
        """Use CUDA graphs, as the pipelines of the model do."""
        from port_kit.parallel.cuda_graphs import graphs_are_possible

        if graphs_are_possible(self.od_config):
            self.transformer.use_cuda_graphs(self.device)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Fill the transformer with random weights through the loader of checkpoints."""
        from port_kit.models.wan.weights.transformer_rules import TRANSFORMER
        from port_kit.parallel.hsdp import shard_before_loading
        from port_kit.remap import load_weights

        shapes = whole_shapes(self.config, self.od_config.dtype)
        shard_before_loading(self.transformer, self.od_config, self.device)
        weights = random_weights(shapes, self.device, self.od_config.dtype)
        load_weights(self.transformer, weights, TRANSFORMER, converted=True)

    def combine_multi_branch_cfg_noise(
        self, predictions: list[Any], true_cfg_scale: Any, cfg_normalize: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Weigh the branches unequally, so that a swap would show."""
        video, audio = (torch.stack(streams) for streams in zip(*predictions, strict=True))
        weights = torch.tensor([1.0, -0.5, 0.3, 0.2]).to(video)
        return torch.tensordot(weights, video, 1), torch.tensordot(weights, audio, 1)

    def forward(self, req: DiffusionRequestBatch, **_: Any) -> DiffusionOutput:
        """Time the step; return its flows and the figures of this rank."""
        from port_kit.parallel.comm.symm_mem import transfer_stats
        from port_kit.parallel.memory import local_bytes

        given = req.sampling_params.extra_args
        torch.manual_seed(0)
        branch = inputs(self.config, *given["size"], self.device, self.od_config.dtype)
        branches = [branch, {**branch, "timestep": branch["timestep"] - 9}]
        branches += [{**branch, "unused": "audio"}, {**branch, "unused": "video"}]

        def step() -> Any:
            return self.predict_noise_with_multi_branch_cfg(True, 1.0, branches)

        loaded = peak_bytes(self.device)
        seconds = [timed(step, self.device) for _ in range(WARM_UP + given["rounds"])][WARM_UP:]
        figures = {
            "seconds": statistics.median(seconds),
            "weight_bytes": local_bytes(self.transformer),
            "peak_bytes_loading": loaded,
            "peak_bytes": peak_bytes(self.device),
            "symm_mem_bytes": transfer_stats["memory"],
            **profiled(step, self.device, given["kernels"]),
        }
        return DiffusionOutput(output={"flows": [flow.float().cpu() for flow in step()], "figures": figures})


def whole_shapes(config: Mapping[str, Any], dtype: torch.dtype) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter as one rank alone has it."""
    from port_kit.models.wan.transformer.model import build_transformer
    from port_kit.parallel.meta_init import meta_init

    with meta_init(dtype):
        return {name: tuple(value.shape) for name, value in build_transformer(config).named_parameters()}


def random_weights(
    shapes: Mapping[str, tuple[int, ...]], device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Yield weights that depend on their name alone, of a scale that keeps activations finite."""
    for name, shape in shapes.items():
        if name.endswith("weight") and len(shape) == 1:
            yield name, torch.ones(shape, device=device, dtype=dtype)
        else:
            generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
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


def register() -> None:
    """Register the pipeline in a worker, which imports this file by its name."""
    from vllm_omni.diffusion.registry import register_diffusion_model

    os.dup2(2, 1)  # stdout is for the result
    sys.path.insert(0, str(Path(__file__).parent))
    register_diffusion_model(
        model_arch="ScalingPipeline", module_name=Path(__file__).stem, class_name="ScalingPipeline"
    )


def write_model(folder: Path, *, tiny: bool) -> dict[str, Any]:
    """Write a model directory without weights; return the transformer's configuration."""
    from port_kit.models.wan.transformer.config import TRANSFORMER_CONFIG

    sizes = TINY if tiny else {}
    config = dict(TRANSFORMER_CONFIG)
    config |= {tower: {"text_dim": 4096, **config[tower], **sizes} for tower in ("video", "audio")}
    (folder / "transformer").mkdir()
    (folder / "transformer/config.json").write_text(json.dumps(config))
    index = {"_class_name": "ScalingPipeline", "_diffusers_version": "0.40.0"}
    (folder / "model_index.json").write_text(json.dumps(index))
    return config


def measure(
    model: Path, layout: str, options: argparse.Namespace, prewarmed: PrewarmedRanks | None = None
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
    request = Request(
        "measure",
        {"extra_args": {"size": options.pixels, "rounds": options.rounds, "kernels": options.kernels}, "seed": 0},
    )
    results = run_workers(model, [request], config=config, setup=register, timeout=options.timeout, prewarmed=prewarmed)
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


def run(options: argparse.Namespace) -> dict[str, Any]:
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
        config = write_model(model, tiny=options.tiny)
        expected, single = measure(model, "single", options, prewarmed)
        rows = {"single": single}
        print(json.dumps(rows), file=sys.stderr, flush=True)
        for layout in layouts:
            try:
                flows, row = measure(model, layout, options, prewarmed)
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
        "model": "tiny" if options.tiny else "11.66 B parameters",
        "layers": config["video"]["num_layers"],
        "size": options.size,
        "dtype": options.dtype,
        "rounds": options.rounds,
        "devices": options.ranks,
        "tolerance": tolerance,
        "layouts": rows,
    }


def main() -> None:
    """Parse the options, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layout", action="append", help="as in port-kit verify parallel; may be given several times")
    parser.add_argument("--ranks", type=int, help="default: the GPUs of the machine, with --tiny 2")
    parser.add_argument("--size", default="704x1024", metavar="HEIGHTxWIDTH", help="pixels; with --tiny 64x64")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--eager", action="store_true", help="without CUDA graphs")
    parser.add_argument("--tiny", action="store_true", help="a small model in float32 on CPU processes")
    parser.add_argument(
        "--kernels", type=int, default=0, help="list so many of rank 0's kernels: name, ms in a step, launches"
    )
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds for one layout")
    options = parser.parse_args()
    if options.tiny and options.size == parser.get_default("size"):
        options.size = "64x64"
    options.pixels = tuple(map(int, options.size.split("x")))
    options.dtype = "float32" if options.tiny else "bfloat16"
    options.ranks = options.ranks or (2 if options.tiny else torch.cuda.device_count())
    print(json.dumps(run(options), indent=1))


if __name__ == "__main__":
    main()
