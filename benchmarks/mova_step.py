"""Seconds of MOVA's denoiser on one GPU: a branch, with and without CUDA graphs, and the change of the video tower.

Weights are random and drawn on the GPU, sizes are those of the published model (18.37 B parameters in a branch,
bfloat16), inputs those of a clip of 193 frames at 24 frames per second. In the same run it measures what the device
gives a matrix product and an attention of the video tower's sizes, and says how long the model's products and
attentions alone would take at those rates. Prints one JSON object; its parts go to stderr as they are known.

    python benchmarks/mova_step.py --size 352x640                            # the size of the checkpoint MOVA-360p
    python benchmarks/mova_step.py --size 720x1280 --rounds 1 --warm-up 0    # of MOVA-720p
    python benchmarks/mova_step.py --switch
    python benchmarks/mova_step.py --tiny --size 64x96 --switch --rounds 1   # small towers, on a CPU

``--warm-up 0`` leaves one call of the first layers alone, which compiles kernels and fills tables.

``--switch`` sets up ``--enable-cpu-offload`` for both video towers as the engine does, and calls them in turn for a
clip of five frames. ``start_up_s`` is the set-up, in which host memory is pinned. Here the towers come from the device;
those of an engine come from host memory that is not pinned. A row has the seconds of the first call of a tower, in
which the other one goes to the host, beside those of its next call. The peak of the device is that of the changes.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from fusion_step import Clock, Sizes, difference, fill, rates
from torch import Tensor

if TYPE_CHECKING:
    from port_kit.models.mova.model.transformer import DualTowerTransformer

FRAMES, FPS, TEXT_TOKENS = 193, 24.0, 100
#: Tokens to which texts are padded; padding is attended.
PADDED_TEXT = 512
#: Of the clip with which towers are changed.
SMALL, SMALL_FRAMES = (64, 96), 5
#: Calls in which towers are changed, each tower twice.
CHANGES = 4
#: Layers that warm up a long branch.
FIRST_LAYERS = 2
_HEADS = {"num_heads": 4, "text_dim": 64}
TINY: Mapping[str, Mapping[str, Any]] = {
    "transformer": {"dim": 96, "ffn_dim": 192, "num_layers": 3, **_HEADS},
    "audio_transformer": {"dim": 48, "ffn_dim": 96, "num_layers": 2, **_HEADS, "num_heads": 2},
    "bridge": {
        "visual_layers": 3,
        "audio_layers": 2,
        "visual_hidden_dim": 96,
        "audio_hidden_dim": 48,
        "head_dim": 24,
    },
}

Configs = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class BridgedSizes(Sizes):
    """Those of the video tower, and of what is beside it.

    Attributes:
        audio_width: width of the audio tower.
        audio_hidden: of its feed-forward.
        audio_layers: of the audio tower and of the bridge.
    """

    audio_width: int
    audio_hidden: int
    audio_layers: int

    @property
    def gemm_flop(self) -> float:
        """Of the linears of all blocks and of the bridge; those of texts are computed once a request."""
        v, a, d, e = self.video, self.audio, self.width, self.audio_width
        video = self.layers * v * (6 * d * d + 2 * d * self.hidden)  # self; q and o of the text's; feed-forward
        audio = self.audio_layers * a * (6 * e * e + 2 * e * self.audio_hidden)
        bridge = self.audio_layers * (v * (2 * d * d + 2 * d * e) + a * (2 * e * e + 2 * e * d))
        return 2.0 * (video + audio + bridge)

    @property
    def attention_flop(self) -> float:
        """Of both towers to themselves and to their text, and of both directions of the bridge."""
        v, a, t, d, e = self.video, self.audio, self.text, self.width, self.audio_width
        video = self.layers * d * (v * v + v * t)
        audio = self.audio_layers * e * (a * a + a * t)
        return 4.0 * (video + audio + self.audio_layers * (d + e) * v * a)


def configs_of(*, tiny: bool) -> Configs:
    """Return the configurations of a video tower, the audio tower and the bridge."""
    from port_kit.models.mova import config

    full = {
        "transformer": config.TRANSFORMER_CONFIG,
        "audio_transformer": config.AUDIO_TRANSFORMER_CONFIG,
        "bridge": config.BRIDGE_CONFIG,
    }
    return {name: {**values, **(TINY[name] if tiny else {})} for name, values in full.items()}


def grid_of(height: int, width: int, frames: int = FRAMES) -> tuple[tuple[int, int, int], int]:
    """Return latent frames, rows and columns of a clip, and its audio latents."""
    from port_kit.models.mova.config import SAMPLE_RATE

    samples = int(SAMPLE_RATE * frames / FPS)
    return ((frames - 1) // 4 + 1, height // 8, width // 8), (samples - 1) // 960 + 1


def sizes_of(configs: Configs, height: int, width: int, frames: int) -> BridgedSizes:
    """Return the sizes of one branch of a clip."""
    (t, h, w), audio = grid_of(height, width, frames)
    video, other = configs["transformer"], configs["audio_transformer"]
    return BridgedSizes(
        video=t * (h // 2) * (w // 2),
        audio=audio,
        text=PADDED_TEXT,
        width=video["dim"],
        hidden=video["ffn_dim"],
        layers=video["num_layers"],
        audio_width=other["dim"],
        audio_hidden=other["ffn_dim"],
        audio_layers=other["num_layers"],
    )


def inputs(
    configs: Configs, height: int, width: int, device: torch.device, dtype: torch.dtype, frames: int = FRAMES
) -> dict[str, Any]:
    """Return one branch's arguments for a clip of this size in pixels; texts are kept as in a request."""
    from port_kit.models.wan.transformer.modality_io import TextContext

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    video, audio = configs["transformer"], configs["audio_transformer"]
    cells, length = grid_of(height, width, frames)
    text = draw(1, TEXT_TOKENS, video["text_dim"])
    return {
        "video": draw(1, video["in_dim"], *cells),
        "audio": draw(1, length, audio["in_dim"]),
        "timestep": torch.tensor(500.0, device=device),
        "video_text": TextContext(text),
        "audio_text": TextContext(text),
        "fps": FPS,
    }


def build(configs: Configs, device: torch.device, names: tuple[str, ...]) -> list[DualTowerTransformer]:
    """Build video towers of these names, and an audio tower and a bridge that they share, with random weights."""
    from port_kit.models.mova.model.bridge import build_bridge
    from port_kit.models.mova.model.transformer import build_audio_transformer, build_transformer

    generator = torch.Generator(device).manual_seed(0)
    with device:
        audio, bridge = build_audio_transformer(configs["audio_transformer"]), build_bridge(configs["bridge"])
        towers = [build_transformer(configs["transformer"], name) for name in names]
    for module in (audio, bridge, *towers):
        fill(module, generator)
    for tower in towers:
        tower.join(audio, bridge)
    return towers


def measure(
    model: DualTowerTransformer, configs: Configs, size: tuple[int, int], clock: Clock, given: argparse.Namespace
) -> dict[str, Any]:
    """One size: a branch, its limit at the measured rates, peak memory, and the same branch as a CUDA graph."""
    branch = inputs(configs, *size, clock.device, given.dtype, given.frames)
    sizes = sizes_of(configs, *size, given.frames)
    found = rates(model.get_submodule("blocks.0.self_attn"), sizes, clock, given.dtype)
    warm_up(model, branch)
    if clock.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    one = clock.median_ms(lambda: model(**branch), warm_up=given.warm_up)
    limit = sizes.limit_ms(**found)
    row = {
        "video_tokens": sizes.video,
        "audio_tokens": sizes.audio,
        "tflop": round((sizes.gemm_flop + sizes.attention_flop) / 1e12, 2),
        **found,
        "branch_ms": one,
        "limit_ms": round(limit, 3),
        "share_of_limit": round(limit / one, 3),
        "peak_gib": peak_gib(clock.device),
    }
    report(row)
    if clock.device.type == "cuda":
        row |= with_graph(model, branch, clock, given.warm_up)
    return row


def warm_up(model: Any, branch: Mapping[str, Any]) -> None:
    """Run the first layers, for the kernels and tables that all layers use; project the texts of all."""
    blocks = model.blocks
    model.blocks = blocks[:FIRST_LAYERS]
    try:
        model(**branch)
    finally:
        model.blocks = blocks
    audio = model.partner.audio.blocks
    for layers, text in ((blocks, branch["video_text"]), (audio, branch["audio_text"])):
        for layer in layers:
            layer.text_keys_values(text)


def with_graph(model: Any, branch: Mapping[str, Any], clock: Clock, warm_up: int) -> dict[str, Any]:
    """Capture a branch as one CUDA graph; return its figures, and whether the flows are equal bit for bit."""
    expected = [flow.float().cpu() for flow in model(**branch)] if warm_up else None
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    reserved = torch.cuda.memory_reserved()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        flows = model(**branch)
    figures = {
        "graph_branch_ms": clock.median_ms(graph.replay, warm_up=warm_up),
        "graph_memory_mib": (torch.cuda.memory_reserved() - reserved) / 2**20,
    }
    if expected is not None:
        figures["graph_relative_error"] = difference(tuple(flow.cpu() for flow in flows), expected)
    return figures


def switch(configs: Configs, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Return the seconds of the calls in which one video tower replaces the other on the device."""
    from port_kit.pipeline.experts import HIGH_NOISE, LOW_NOISE

    towers = build(configs, device, (HIGH_NOISE, LOW_NOISE))
    parameters = [list(tower.parameters()) for tower in towers]
    result: dict[str, Any] = {"tower_bytes": sum(parameter.nbytes for parameter in parameters[1])}
    result["start_up_s"] = round(seconds(partial(offload, towers, device), device), 3)
    result["pinned_bytes"] = sum(p.nbytes for tower in parameters for p in tower if p.is_cpu and p.is_pinned())
    report(result)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    branches = [inputs(configs, *SMALL, device, dtype, SMALL_FRAMES) for _ in towers]
    seconds(partial(towers[0], **branches[0]), device)
    rows = []
    for change in range(1, CHANGES + 1):
        call = partial(towers[change % 2], **branches[change % 2])
        first, again = seconds(call, device), seconds(call, device)
        figures = {"first_call_s": first, "next_call_s": again, "switch_s": first - again}
        rows.append({name: round(value, 3) for name, value in figures.items()})
        report(rows[-1])
    on_device = [name for name, tower in zip(("high", "low"), towers, strict=True) if is_on(tower, device)]
    return {
        **result,
        "towers_on_device": on_device,
        "longest_switch_s": max(row["switch_s"] for row in rows),
        "changes": rows,
        "peak_gib": peak_gib(device),
        "host_peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3),
    }


def offload(towers: Sequence[DualTowerTransformer], device: torch.device) -> None:
    """Set up the offload of video towers by vLLM-Omni, for a pipeline that has them and what they share."""
    from vllm_omni.diffusion.models.interface import SupportsComponentDiscovery
    from vllm_omni.diffusion.offloader import ModelLevelOffloadBackend, OffloadConfig, OffloadStrategy

    from port_kit.pipeline.experts import HIGH_NOISE, LOW_NOISE
    from port_kit.pipeline.offload import PinnedOffload

    class Towers(PinnedOffload, SupportsComponentDiscovery):
        _dit_modules: ClassVar[list[str]] = [HIGH_NOISE, LOW_NOISE]
        _encoder_modules: ClassVar[list[str]] = []
        _vae_modules: ClassVar[list[str]] = []
        _resident_modules: ClassVar[list[str]] = ["audio_transformer", "bridge"]

    partner, pipeline = towers[0].partner, Towers()
    for name, module in zip(
        (*Towers._dit_modules, *Towers._resident_modules), (*towers, partner.audio, partner.bridge), strict=True
    ):
        pipeline.add_module(name, module)
    ModelLevelOffloadBackend(OffloadConfig(OffloadStrategy.MODEL_LEVEL), device).enable(pipeline)


def is_on(module: torch.nn.Module, device: torch.device) -> bool:
    """Return True if all weights are on a device."""
    return all(parameter.device.type == device.type for parameter in module.parameters())


def seconds(call: Any, device: torch.device) -> float:
    """Return the seconds of a call, with its transfers."""
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_gib(device: torch.device) -> float:
    """Return the most memory that was allocated; 0 on a CPU, which does not count."""
    return round(torch.cuda.max_memory_allocated() / 2**30, 3) if device.type == "cuda" else 0.0


def report(row: Mapping[str, Any]) -> None:
    """Show a part of the result early: a run may be cut off."""
    print(json.dumps(row), file=sys.stderr, flush=True)


def run(given: argparse.Namespace) -> dict[str, Any]:
    """Measure what was asked for, one after the other."""
    from port_kit.runtime.single_process import single_rank

    device = torch.device("cuda" if torch.cuda.is_available() and not given.tiny else "cpu")
    given.dtype = torch.float32 if given.tiny else torch.bfloat16
    configs = configs_of(tiny=given.tiny)
    clock = Clock(device, given.rounds)
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "dtype": str(given.dtype).removeprefix("torch."),
        "frames": given.frames,
        "rounds": given.rounds,
    }
    with torch.inference_mode(), single_rank(dtype=given.dtype, device=device, default_device=False):
        if given.size:
            (model,) = build(configs, device, ("transformer",))
            parts = (model, model.partner.audio, model.partner.bridge)
            result["parameters"] = sum(parameter.numel() for part in parts for parameter in part.parameters())
            for size in given.size:
                height, width = map(int, size.split("x"))
                result[size] = measure(model, configs, (height, width), clock, given)
            del model, parts
        if given.switch:
            result["switch"] = switch(configs, device, given.dtype)
    return result


def main() -> None:
    """Parse the options, measure, print."""
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # stdout is for the result
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--size", action="append", metavar="HEIGHTxWIDTH", help="pixels; may be given several times")
    options.add_argument("--frames", type=int, default=FRAMES, help="of the clip; a multiple of 4, plus 1")
    options.add_argument("--switch", action="store_true", help="change the video tower under offload")
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--warm-up", type=int, default=1, help="branches before the first round")
    options.add_argument("--tiny", action="store_true", help="small towers in float32 on the CPU")
    given = options.parse_args()
    if not given.size and not given.switch:
        options.error("nothing to measure: give --size HEIGHTxWIDTH or --switch")
    print(json.dumps(run(given), indent=1))


if __name__ == "__main__":
    main()
