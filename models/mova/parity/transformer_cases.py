"""Golden cases of the denoisers: recorded forward calls of the original, and recorded positions.

``inputs.json`` of a case names its video tower, the frame rate and the folders of its checkpoints.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from port_kit.models.mova.model.bridge import BridgeConfig, position_table, video_positions
from port_kit.models.mova.parity.goldens import DTYPES, Goldens, compare
from port_kit.models.wan.transformer.config import RopeConfig
from port_kit.models.wan.transformer.layers import timestep_embedding
from port_kit.models.wan.transformer.rope import RopeTables, rotate
from port_kit.parity import Bound, Case, Pair
from port_kit.parity.hooks import outputs_of
from port_kit.runtime.single_process import single_rank

FP32 = Bound(max_abs=5e-5, why="the same mathematics in another order of summation")
ROPE = Bound(max_abs=1e-6, why="the same operations in the same order")
ANGLES = Bound(max_abs=2e-5, why="float32 angles of up to 100, whose rounding is 8e-6")

Read = Callable[[Tensor], Tensor]

_TOWER, _ATTENTION = r"(video|audio)", r"bridge\.(a2v|v2a)\.(\d+)"
_BLOCK = rf"{_TOWER}\.blocks\.(\d+)"
_BRIDGE = {"a2v": "audio_to_video", "v2a": "video_to_audio"}


def _heads(output: Tensor) -> Tensor:
    return output.flatten(2)


def _part(index: int, of: int) -> Read:
    return lambda output: output.chunk(of, -1)[index]


#: Recorded names, the module whose output has the value, and how to read it. Values inside of fused operations (norms
#: of the residual streams, rotated queries) are the output of no module here.
MODULES: tuple[tuple[str, str, Read], ...] = (
    (rf"{_TOWER}\.time_(embedding|projection)", r"{0}.time_{1}", lambda output: output.flatten(2).flatten(0, 1)),
    (rf"{_TOWER}\.text_embedding", r"{0}.text_embedding", lambda output: output),
    (rf"{_TOWER}\.patch_embedding", r"{0}.patch_embedding", lambda output: output.transpose(1, 2)),
    (rf"{_TOWER}\.head", r"{0}.head", lambda output: output),
    (_BLOCK, r"{0}.blocks.{1}", lambda output: output),
    (rf"{_BLOCK}\.(self_attn|cross_attn)", r"{0}.blocks.{1}.{2}.o", lambda output: output),
    (rf"{_BLOCK}\.self_attn\.q", r"{0}.blocks.{1}.self_attn.qkv", _part(0, 3)),
    (rf"{_BLOCK}\.self_attn\.attn", r"{0}.blocks.{1}.self_attn.attn", _heads),
    (rf"{_BLOCK}\.cross_attn\.attn", r"{0}.blocks.{1}.cross_attn.text_attn", _heads),
    (rf"{_BLOCK}\.ffn", r"{0}.blocks.{1}.ffn.down", lambda output: output),
    (_ATTENTION, r"bridge.layers.{1}.{0}.o", lambda output: output),
    (rf"{_ATTENTION}\.inner\.(norm_q|norm_k)", r"bridge.layers.{1}.{0}.{2}", lambda output: output),
    (rf"{_ATTENTION}\.inner\.v", r"bridge.layers.{1}.{0}.kv", _part(1, 2)),
    (rf"{_ATTENTION}\.inner\.attn", r"bridge.layers.{1}.{0}.attn", _heads),
    (r"bridge\.(\d+)\.video_out", r"bridge.layers.{0}", lambda output: output),
)


def cases(goldens: Goldens) -> Iterator[Case]:
    """Yield the cases below ``transformer/``: positions, then forward calls in both recorded dtypes."""
    if goldens.tensors("transformer/rope/rope"):
        yield Case("transformer/rope fp32", partial(run_positions, goldens))
    for path in sorted(goldens.folder.glob("transformer/*/inputs.json")):
        for word in DTYPES:
            if goldens.tensors(f"transformer/{path.parent.name}/outputs_{word}"):
                yield Case(
                    f"transformer/{path.parent.name} {word}", partial(run_forward, goldens, path.parent.name, word)
                )


def run_forward(goldens: Goldens, name: str, word: str, device: str = "cpu") -> Iterator[Pair]:
    """Run a recorded call; compare the outputs of modules in the order of the run, then the flows."""
    folder, dtype = f"transformer/{name}", DTYPES[word]
    meta, inputs = goldens.json(f"{folder}/inputs.json"), goldens.tensors(f"{folder}/inputs")
    with single_rank(dtype, device), torch.inference_mode():
        parts = build_denoisers(goldens, meta, text_length=inputs["context"].shape[1])
        given = {key: value.to(device) for key, value in inputs.items()}
        exact = goldens.tensors(f"{folder}/intermediates_fp32")
        readers = dict(_readers(exact))
        wanted = [path for path, _ in readers.values()]
        recording: AbstractContextManager[dict[str, Tensor]] = outputs_of(parts, wanted) if wanted else nullcontext({})
        with recording as found:
            video, audio = parts["video"](
                given["visual_latents"].to(dtype),
                given["audio_latents"].transpose(1, 2).to(dtype),
                given["timestep"],
                *(given["context"].to(dtype),) * 2,
                fps=meta["video_fps"],
                audio_timestep=given["audio_timestep"],
            )
    values = {key: read(found[path]).reshape(exact[key].shape) for key, (path, read) in readers.items()}
    rounded = goldens.tensors(f"{folder}/intermediates_bf16") if word == "bf16" else None
    for key, value in values.items():
        yield from compare(key, value, exact, rounded, FP32)
    recorded = [goldens.tensors(f"{folder}/outputs_{each}") for each in DTYPES]
    flows = {"video": video, "audio": audio.transpose(1, 2)}
    for key, flow in flows.items():
        yield from compare(key, flow, recorded[0], recorded[1] if word == "bf16" else None, FP32)


def build_denoisers(goldens: Goldens, meta: Mapping[str, Any], *, text_length: int) -> nn.ModuleDict:
    """Return the video tower of a case with its partners, as ``video``, ``audio`` and ``bridge``.

    The original attends the text as it is given; the pipeline pads it before.
    """
    changes = {"text_len": text_length}
    video = goldens.component(meta["expert"], changes=changes)
    audio = goldens.component("audio_dit", changes=changes)
    bridge = goldens.component("dual_tower_bridge")
    video.join(audio, bridge)
    return nn.ModuleDict({"video": video, "audio": audio, "bridge": bridge})


def _readers(recorded: Mapping[str, Tensor]) -> Iterator[tuple[str, tuple[str, Read]]]:
    """Yield the recorded names that modules have, each with the path of the module and the function that reads it."""
    for name in recorded:
        for pattern, template, read in MODULES:
            if match := re.fullmatch(pattern, name):
                yield name, (template.format(*(_BRIDGE.get(group, group) for group in match.groups())), read)


def run_positions(goldens: Goldens) -> Iterator[Pair]:
    """Compare rotations of the towers, positions of the bridge, and sinusoids of timesteps."""
    recorded = goldens.tensors("transformer/rope/rope")
    config = BridgeConfig.from_dict(goldens.json(f"ckpts/{goldens.checkpoint.name}/dual_tower_bridge/config.json"))
    tables = RopeTables(RopeConfig(), config.head_dim)
    for name, expected in recorded.items():
        grid, _, rest = name.partition(".")
        sizes = tuple(map(int, re.findall(r"\d+", grid)))
        if rest in ("video.out", "audio.out"):
            heads = recorded[name.replace(".out", ".in")].unflatten(2, (-1, config.head_dim))
            table = tables.table(sizes[:3] if rest == "video.out" else sizes[3:])
            yield Pair(name, rotate(heads, table).flatten(2), expected, ROPE)
        elif match := re.fullmatch(r"bridge\.fps([\d.]+)\.(first_frame_bias\.)?(video|audio)_(cos|sin)", rest):
            yield Pair(name, _bridge_angles(config, sizes, *match.groups()), expected, ANGLES)
    if "sinusoid.out" in recorded:
        expected = recorded["sinusoid.out"]
        actual = timestep_embedding(recorded["sinusoid.timesteps"], expected.shape[1]).float()
        yield Pair("sinusoid.out", actual, expected, ROPE)


def _bridge_angles(
    config: BridgeConfig, sizes: tuple[int, ...], fps: str, bias: str | None, stream: str, function: str
) -> Tensor:
    """Return cosines or sines of the bridge, as recorded: once per latent frame, for both halves of a head."""
    config = replace(config, first_frame_bias=bool(bias))
    positions = tuple(map(float, range(sizes[3])))
    if stream == "video":
        positions = video_positions(sizes[0], float(fps), config)
    table = position_table(positions, config.head_dim, torch.float32, torch.device("cpu"))
    part = table[..., ("cos", "sin").index(function)]
    return torch.cat((part, part), -1)
