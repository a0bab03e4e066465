"""Seconds of the fusion transformer: one branch, one DreamID-Omni step of four branches, and where the time goes.

Weights are random, sizes are those of the published model (11.66 B parameters, bfloat16), inputs those of a clip of 31
latent frames with one picture and one voice. In the same run it measures what the device gives a matrix product and an
attention of the model's own sizes, and says how long the model's products and attentions alone would take at those
rates. Every figure is the median of ``--rounds`` after two warm-up rounds. Prints one JSON object.

    python benchmarks/fusion_step.py --size 704x1024 --size 480x832     # as it is served
    python benchmarks/fusion_step.py --also inductor --also plain       # and without the kernels of the project
    python benchmarks/fusion_step.py --kernels                          # where a branch's time goes, kernel by kernel
    python benchmarks/fusion_step.py --precision fp8 --precision fp8_attention   # in eight bits, and how far off
    python benchmarks/fusion_step.py --tiny --rounds 1                  # a small model, on a CPU

Variants for comparison (``--also``): ``plain`` runs the plain PyTorch forms of the fused steps, ``inductor`` compiles
these with torch.compile. Their flows are compared with the served form's. So are those of ``--precision``: ``fp8`` has
eight-bit linears, ``fp8_attention`` also attention of the video in eight bits.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

LATENT_FRAMES, AUDIO_LATENTS, PICTURES, VOICE_LATENTS, TEXT_TOKENS = 31, 157, 1, 31, 100
#: Parts of kernels' names, by what they do.
KINDS = {
    "attention": ("flash", "Flash"),
    "matrix products": ("nvjet", "gemm", "cutlass", "mm"),
    "fused steps": ("_add_norms", "_rms_rope"),
    "quantization": ("_quantize_rows", "_of_heads", "_quantize_heads"),
}
#: Fields of the engine's configuration per precision.
PRECISIONS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "fp8": {"quantization_config": "fp8"},
    "fp8_attention": {"quantization_config": "fp8", "diffusion_kv_cache_dtype": "fp8"},
}
TINY = {"dim": 96, "ffn_dim": 192, "num_heads": 4, "num_layers": 2, "text_dim": 64}


@dataclass(frozen=True)
class Sizes:
    """Tokens of one branch, references included, and the model's own sizes."""

    video: int
    audio: int
    text: int
    width: int
    hidden: int
    layers: int

    @property
    def gemm_flop(self) -> float:
        """Of the linears of all blocks; those of texts are computed once a request and not counted."""
        tokens, d = self.video + self.audio, self.width
        a_token = 4 * d * d + 2 * d * d + 2 * d * d + 2 * d * self.hidden  # self; q and o; k and v for the other; ffn
        return 2.0 * self.layers * tokens * a_token

    @property
    def attention_flop(self) -> float:
        """Of self-attention, of attention to the text, and of each stream to the other."""
        v, a, t = self.video, self.audio, self.text
        pairs = v * v + a * a + (v + a) * t + 2 * v * a
        return 4.0 * self.layers * self.width * pairs

    def limit_ms(self, gemm_tflops: float, attention_tflops: float) -> float:
        """Return the milliseconds of products and attention alone, at these rates."""
        return self.gemm_flop / gemm_tflops / 1e9 + self.attention_flop / attention_tflops / 1e9


class Clock:
    """Times a call on a device: by the device's own events, or by the host's clock on a CPU."""

    def __init__(self, device: torch.device, rounds: int) -> None:
        self.device, self.rounds = device, rounds

    def median_ms(self, call: Callable[[], object], warm_up: int = 2) -> float:
        for _ in range(warm_up):
            call()
        return round(statistics.median(self.once_ms(call) for _ in range(self.rounds)), 3)

    def once_ms(self, call: Callable[[], object]) -> float:
        if self.device.type != "cuda":
            start = time.perf_counter()
            call()
            return (time.perf_counter() - start) * 1e3
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end))


def build(config: dict[str, Any], device: torch.device, engine: Any, precision: str = "bf16") -> nn.Module:
    """Build the transformer with random weights, of a scale that keeps activations finite."""
    from vllm_omni.quantization import build_quant_config

    from port_kit.models.wan.transformer.model import build_transformer

    fields = PRECISIONS[precision]
    engine.quantization_config = build_quant_config(fields.get("quantization_config"))
    engine.diffusion_kv_cache_dtype = fields.get("diffusion_kv_cache_dtype")
    with device:
        model = build_transformer(config)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:  # quantized when they are loaded, which nothing does here
                filled = torch.empty_like(parameter, device=device)
                module.register_parameter(name, nn.Parameter(filled, requires_grad=False))
    fill(model, torch.Generator(device).manual_seed(0))
    for module in model.modules():
        if getattr(getattr(module, "quant_method", None), "uses_meta_device", False):
            module.quant_method.process_weights_after_loading(module)  # type: ignore[union-attr, operator]
    return model


def fill(model: nn.Module, generator: torch.Generator) -> nn.Module:
    """Draw the weights where they are; return the model."""
    for name, parameter in model.eval().requires_grad_(False).named_parameters():
        if name.endswith("weight") and parameter.dim() == 1:
            parameter.data.fill_(1.0)
        else:
            parameter.data.normal_(std=0.02, generator=generator)
    return model


def inputs(config: dict[str, Any], height: int, width: int, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Return one branch's arguments for a clip of this size in pixels; texts are kept as in a request."""
    from port_kit.models.wan.transformer.modality_io import TextContext

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    channels, text_dim = config["video"]["in_dim"], config["video"]["text_dim"]
    return {
        "video": draw(1, channels, LATENT_FRAMES + PICTURES, height // 16, width // 16),
        "audio": draw(1, AUDIO_LATENTS + VOICE_LATENTS, config["audio"]["in_dim"]),
        "timestep": torch.tensor(500, device=device),
        "video_text": TextContext(draw(1, TEXT_TOKENS, text_dim)),
        "audio_text": TextContext(draw(1, TEXT_TOKENS, text_dim)),
        "video_reference_frames": PICTURES,
        "audio_reference_lengths": (VOICE_LATENTS,),
    }


def sizes_of(config: dict[str, Any], height: int, width: int) -> Sizes:
    tower = config["video"]
    video = (LATENT_FRAMES + PICTURES) * (height // 32) * (width // 32)
    return Sizes(
        video, AUDIO_LATENTS + VOICE_LATENTS, tower["text_len"], tower["dim"], tower["ffn_dim"], tower["num_layers"]
    )


def rates(attention: Any, sizes: Sizes, clock: Clock, dtype: torch.dtype) -> dict[str, float]:
    """Measure TFLOP/s of a feed-forward's product and of the video's own self-attention layer."""
    x = torch.randn(sizes.video, sizes.width, device=clock.device, dtype=dtype)
    w = torch.randn(sizes.hidden, sizes.width, device=clock.device, dtype=dtype)
    gemm = clock.median_ms(lambda: nn.functional.linear(x, w))
    heads = attention.heads
    q, k, v = (
        torch.randn(1, sizes.video, heads, sizes.width // heads, device=clock.device, dtype=dtype) for _ in "qkv"
    )
    attended = clock.median_ms(lambda: attention.attn(q, k, v))
    return {
        "gemm_tflops": 2 * x.shape[0] * w.numel() / gemm / 1e9,
        "attention_tflops": 4 * sizes.video**2 * sizes.width / attended / 1e9,
    }


@contextmanager
def variant(name: str) -> Iterator[None]:
    """Exchange the forms of the fused steps while the context lasts."""
    from port_kit.models.wan.transformer import fused_ops

    compiled = partial(torch.compile, dynamic=False) if name == "inductor" else lambda function: function
    gelu = compiled(partial(nn.functional.gelu, approximate="tanh"))
    changes = {
        "add_norms": compiled(fused_ops.add_norms_torch),
        "rms_norm": compiled(fused_ops.rms_norm_torch),
        "linear_gelu": lambda layer, x, _reader=None: gelu(layer(x)),
    }
    before = {key: getattr(fused_ops, key) for key in changes}
    vars(fused_ops).update(changes)
    try:
        yield
    finally:
        vars(fused_ops).update(before)


def measure(
    model: nn.Module,
    config: dict[str, Any],
    size: tuple[int, int],
    branch: dict[str, Any],
    clock: Clock,
    dtype: Any,
    also: list[str],
) -> Any:
    """One size: a branch, its floor at the measured rates, the step of four branches, peak memory, the variants."""
    sizes = sizes_of(config, *size)
    found = rates(model.get_submodule("blocks.0.video.self_attn"), sizes, clock, dtype)
    if clock.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    one = clock.median_ms(lambda: model(**branch))
    branch_peak = torch.cuda.max_memory_allocated() / 2**30 if clock.device.type == "cuda" else 0.0
    limit = sizes.limit_ms(**found)
    branches = [branch, branch, {**branch, "unused": "audio"}, {**branch, "unused": "video"}]
    step = clock.median_ms(lambda: [model(**each) for each in branches], warm_up=1)
    flop = sizes.gemm_flop + sizes.attention_flop
    expected = [flow.float() for flow in model(**branch)]
    others: dict[str, Any] = {}
    if clock.device.type == "cuda":
        others = with_graphs(model, branch, branches, expected, clock)
    for name in also:
        with variant(name):
            others[f"{name}_ms"] = clock.median_ms(lambda: model(**branch))
            others[f"{name}_relative_error"] = difference(model(**branch), expected)
    return {
        "video_tokens": sizes.video,
        "tflop": round(flop / 1e12, 2),
        **found,
        "branch_ms": one,
        "limit_ms": round(limit, 3),
        "branch_over_limit": round(one / limit, 3),
        "branch_tflops": round(flop / one / 1e9, 2),
        "four_branch_step_ms": step,
        "first_branch_ms": round(clock.once_ms(lambda: model(**inputs(config, *size, clock.device, dtype))), 3),
        "branch_again_ms": clock.median_ms(lambda: model(**branch)),
        "peak_gib": round(branch_peak, 3),
        "launch_ms": launching(lambda: model(**branch), clock.device),
        **others,
    }


def in_precision(model: nn.Module, branch: dict[str, Any], expected: list[Tensor], clock: Clock) -> dict[str, Any]:
    """Return the figures of a branch in another precision, and the difference of its flows."""
    on_gpu = clock.device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    one = clock.median_ms(lambda: model(**branch))
    flows = [flow.float() for flow in model(**branch)]
    graphs = with_graphs(model, branch, [branch], flows, clock) if on_gpu else {}
    return {
        "branch_ms": one,
        "relative_error": difference((flows[0], flows[1]), expected),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 3) if on_gpu else 0.0,
        **graphs,
    }


def renewed(branch: dict[str, Any]) -> dict[str, Any]:
    """Return a branch for another model: its texts are not projected."""
    from port_kit.models.wan.transformer.modality_io import TextContext

    return {name: TextContext(value.raw) if isinstance(value, TextContext) else value for name, value in branch.items()}


def with_graphs(model: Any, branch: Any, branches: list[Any], expected: list[Tensor], clock: Clock) -> dict[str, Any]:
    """Return the figures of the same calls as CUDA graphs, and whether the flows are equal bit for bit."""
    reserved = torch.cuda.memory_reserved()
    model.use_cuda_graphs(clock.device)
    try:
        for _ in range(2):
            flows = model(**branch)
        equal = all(flow.float().equal(other) for flow, other in zip(flows, expected, strict=True))
        figures = {
            "graphs_equal": equal,
            "graphs_branch_ms": clock.median_ms(lambda: model(**branch)),
            "graphs_launch_ms": launching(lambda: model(**branch), clock.device),
            "graphs_memory_mib": (torch.cuda.memory_reserved() - reserved) / 2**20,
        }
        if len(branches) > 1:
            step = clock.median_ms(lambda: [model(**each) for each in branches], warm_up=3)
            figures["graphs_four_branch_step_ms"] = step
    finally:
        model.graphs = None
        torch.cuda.empty_cache()
    return figures


def difference(flows: tuple[Tensor, ...], expected: list[Tensor]) -> float:
    """Return the larger relative error (L2) of the two flows."""
    pairs = zip(flows, expected, strict=True)
    return max(((a.float() - b).norm() / b.norm()).item() for a, b in pairs)


def launching(call: Callable[[], object], device: torch.device) -> float:
    """Return the milliseconds that the host needs to launch a call, the median of five."""
    spent = []
    for _ in range(5):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        spent.append(time.perf_counter() - start)
    return round(statistics.median(spent) * 1e3, 3)


def kernels(model: nn.Module, branch: dict[str, Any], device: torch.device, shown: int = 30) -> dict[str, Any]:
    """Where one branch's time goes, kernel by kernel, the longest first."""
    from torch.profiler import ProfilerActivity, profile

    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiled:
        model(**branch)
        if on_gpu:
            torch.cuda.synchronize()
    spent = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    events = sorted(profiled.key_averages(), key=lambda event: -getattr(event, spent))
    shares: dict[str, float] = defaultdict(float)
    for event in events:
        kind = next((kind for kind, marks in KINDS.items() if any(mark in event.key for mark in marks)), "other")
        shares[kind] += getattr(event, spent) / 1e3
    listed = [
        {"kernel": event.key[:100], "calls": event.count, "ms": round(getattr(event, spent) / 1e3, 3)}
        for event in events[:shown]
    ]
    return {"sums_ms": {kind: round(ms, 2) for kind, ms in shares.items()}, "kernels": listed}


def run(given: argparse.Namespace) -> dict[str, Any]:
    from port_kit.models.wan.transformer.config import TRANSFORMER_CONFIG
    from port_kit.runtime.single_process import single_rank

    device = torch.device("cuda" if torch.cuda.is_available() and not given.tiny else "cpu")
    dtype = torch.float32 if given.tiny else torch.bfloat16
    config = dict(TRANSFORMER_CONFIG)
    if given.tiny:
        config |= {tower: {**config[tower], **TINY} for tower in ("video", "audio")}
    else:
        config |= {tower: {"text_dim": 4096, **config[tower]} for tower in ("video", "audio")}
    sizes = [tuple(map(int, text.split("x"))) for text in given.size or (["64x96"] if given.tiny else ["704x1024"])]
    clock = Clock(device, given.rounds)
    with torch.inference_mode(), single_rank(dtype=dtype, device=device, default_device=False) as engine:
        model = build(config, device, engine)
        result: dict[str, Any] = {
            "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
            "torch": torch.__version__,
            "dtype": str(dtype).removeprefix("torch."),
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "rounds": given.rounds,
        }
        branches = {size: inputs(config, size[0], size[1], device, dtype) for size in sizes}
        expected = {}
        for size, branch in branches.items():
            found = measure(model, config, (size[0], size[1]), branch, clock, dtype, given.also)
            result[f"{size[0]}x{size[1]}"] = found
            expected[size] = [flow.float() for flow in model(**branch)]
        if given.kernels:
            result["profile"] = kernels(model, branches[sizes[0]], device)
        for precision in given.precision:
            model = nn.Module()  # the memory is needed by the next one
            model = build(config, device, engine, precision)
            own = {size: renewed(branch) for size, branch in branches.items()}
            for size, branch in own.items():
                found = in_precision(model, branch, expected[size], clock)
                result[f"{size[0]}x{size[1]}"][precision] = found
                print(json.dumps({precision: found}), file=sys.stderr, flush=True)
            if given.kernels:
                result[f"profile of {precision}"] = kernels(model, own[sizes[0]], device)
    return result


def main() -> None:
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # stdout is for the result
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--size", action="append", metavar="HEIGHTxWIDTH", help="pixels; may be given several times")
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--also", action="append", default=[], choices=("plain", "inductor"))
    options.add_argument("--precision", action="append", default=[], choices=[*PRECISIONS][1:])
    options.add_argument("--kernels", action="store_true", help="profile one branch of the first size")
    options.add_argument("--tiny", action="store_true", help="a small model in float32 on the CPU")
    print(json.dumps(run(options.parse_args()), indent=1))


if __name__ == "__main__":
    main()
