"""The bridge of MOVA: attention between the video and the audio tower, before a layer of both.

Shape suffixes: B batch, V video tokens, A audio tokens, S tokens that query, O tokens of the other stream, D width of
the stream that queries, E width of the other one, N heads of this rank, H head dim.

Its positions are in units of audio latents. Unlike those of the towers they rotate the first half of a head with the
second one, with angles in float32. All tokens of a latent frame have the same position.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from vllm.model_executor.models.utils import maybe_prefix

from port_kit.errors import ConfigError
from port_kit.escape import quoted
from port_kit.models.wan.transformer import fused_ops
from port_kit.models.wan.transformer.attention import GatherOperand, RotaryContext, split_heads
from port_kit.models.wan.transformer.fused_ops import PartialSums, Residual, ScaleShift
from port_kit.models.wan.transformer.layers import QKNorm, tp_square_sums
from port_kit.models.wan.transformer.rope import KEPT_TABLES, THETA
from port_kit.models.wan.transformer.tower import stacked_parameters
from port_kit.parallel import linear
from port_kit.parallel.hsdp import meta_blocks
from port_kit.parallel.layers import attention, engine_quantization

if TYPE_CHECKING:
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

EPS = 1e-6  # of every norm; the original's constructor, no file has it
#: Tokens that are rotated at a time: a clip of 720p has 176,400, of 20 kB each in float32.
ROTATED_TOKENS = 16_384
#: Frames of a video per latent frame, after the first.
FRAMES_PER_LATENT = 4
#: Options of the original's JSON of which only one value is supported: the published one.
REQUIRED_VALUES: Mapping[str, Any] = {
    "interaction_strategy": "full",
    "apply_cross_rope": True,
    "trainable_condition_scale": False,
    "pooled_adaln": False,
}


@dataclass(frozen=True)
class BridgeConfig:
    """Architecture of the bridge.

    Attributes:
        layers: before as many layers of the towers.
        video_dim: width of the video tower.
        audio_dim: width of the audio tower.
        head_dim: width of a head, the same in both directions.
        audio_rate: audio latents per second.
        first_frame_bias: the first latent frame of a video lasts one frame; else all last equally long.
    """

    layers: int
    video_dim: int
    audio_dim: int
    head_dim: int
    audio_rate: float
    first_frame_bias: bool

    def __post_init__(self) -> None:
        for name in ("video_dim", "audio_dim"):
            if getattr(self, name) % self.head_dim:
                raise ConfigError(f"{name} {getattr(self, name)} does not divide into heads of {self.head_dim}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> BridgeConfig:
        """Read the original's JSON.

        Raises:
            ConfigError: a field is missing, or an option has an unsupported value.
        """
        for name, required in REQUIRED_VALUES.items():
            if values.get(name, required) != required:
                raise ConfigError(
                    f"{name} of the bridge is {quoted(values[name])}; only {quoted(required)} is supported"
                )
        names = {
            "layers": "audio_layers",
            "video_dim": "visual_hidden_dim",
            "audio_dim": "audio_hidden_dim",
            "head_dim": "head_dim",
            "audio_rate": "audio_fps",
            "first_frame_bias": "apply_first_frame_bias_in_rope",
        }
        if missing := [original for original in names.values() if original not in values]:
            raise ConfigError(f"the bridge's config has no {quoted(missing[0])}")
        return cls(**{name: values[original] for name, original in names.items()})


class BridgeAttention(nn.Module):
    """Attention of a stream to the other one. Only the other stream is normalized before its projection.

    Args:
        dim: width D.
        other_dim: width E.
        head_dim: width H of a head.
        gather: operand that ranks exchange: that of the audio, which has far fewer tokens.
        quant: quantization of the linears.
        prefix: path of this module.
    """

    def __init__(
        self,
        dim: int,
        other_dim: int,
        head_dim: int,
        gather: GatherOperand,
        quant: QuantizationConfig | None,
        prefix: str,
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(other_dim, EPS)
        self.q = linear.column(dim, dim, quant, f"{prefix}.q")
        self.kv = linear.merged(other_dim, [dim, dim], quant, f"{prefix}.kv")
        self.o = linear.row(dim, dim, quant, f"{prefix}.o")
        self.norm_q, self.norm_k = QKNorm(dim, EPS), QKNorm(dim, EPS)
        self.heads = self.q.output_size_per_partition // head_dim
        self.attn = attention(
            self.heads, head_dim, f"{prefix}.attn", role="cross", gather=gather, allow_fp32_fallback=True
        )

    def forward(
        self, x_BSD: Tensor, rotary: RotaryContext, other_BOE: Tensor, other_rotary: RotaryContext
    ) -> PartialSums:
        """Return ``[B, S, D]``, possibly as partial sums."""
        source = ScaleShift(self.norm.weight, self.norm.bias)
        (other,) = fused_ops.add_norms(other_BOE, None, (source,), (other_BOE.shape[1],), EPS)
        q = self.q(x_BSD)
        k, v = self.kv(other).chunk(2, -1)
        q_squares, k_squares = tp_square_sums(q, k)
        (q,), (k,) = self.norm_q(q, q_squares), self.norm_k(k, k_squares)
        q = rotate_halves(split_heads(q, self.heads), rotary.rope)
        k = rotate_halves(split_heads(k, self.heads), other_rotary.rope)
        attended = self.attn(q, k, split_heads(v, self.heads), other_rotary.length)
        return linear.row_parallel_partials(self.o, attended.flatten(2))


class BridgeLayer(nn.Module):
    """Both directions before a layer; each reads the other stream as it was before this module."""

    def __init__(self, config: BridgeConfig, quant: QuantizationConfig | None, prefix: str) -> None:
        super().__init__()
        video, audio, head = config.video_dim, config.audio_dim, config.head_dim
        self.audio_to_video = BridgeAttention(video, audio, head, "kv", quant, f"{prefix}.audio_to_video")
        self.video_to_audio = BridgeAttention(audio, video, head, "q", quant, f"{prefix}.video_to_audio")

    def forward(
        self, video: Tensor, audio: Tensor, video_positions: RotaryContext, audio_positions: RotaryContext
    ) -> tuple[Tensor, Tensor]:
        """Return the tokens of both streams, ``[B, V, D]`` and ``[B, A, E]``."""
        # partial sums must be added before the next exchange
        to_video = self.audio_to_video(video, video_positions, audio, audio_positions)
        bridged = fused_ops.add(video, Residual(to_video, None), (video.shape[1],))
        to_audio = self.video_to_audio(audio, audio_positions, video, video_positions)
        return bridged, fused_ops.add(audio, Residual(to_audio, None), (audio.shape[1],))


class DualTowerBridge(nn.Module):
    """The bridge's layers and positions.

    Args:
        config: architecture.
        quant_config: quantization of the linears; None for none.
        prefix: path of this module in the pipeline.
    """

    _hsdp_shard_conditions: ClassVar = [lambda _name, module: isinstance(module, BridgeLayer)]
    packed_modules_mapping: ClassVar = {"kv": ["k", "v"]}
    stacked_params_mapping: ClassVar = stacked_parameters(packed_modules_mapping)

    def __init__(
        self, config: BridgeConfig, *, quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__()
        self.config = config
        with meta_blocks():
            self.layers = nn.ModuleList(
                BridgeLayer(config, quant_config, maybe_prefix(prefix, f"layers.{i}")) for i in range(config.layers)
            )

    def ropes(self, grid: tuple[int, ...], length: int, fps: float, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return the tables of all video and audio tokens, ``[1, V, H/2, 2]`` and ``[1, A, H/2, 2]``.

        Args:
            grid: (frames, rows, columns) of video tokens.
            length: audio tokens.
            fps: frames of the video per second.
            like: has the device, and the dtype that cosines and sines are rounded to as in the original.
        """
        video, audio = (
            position_table(positions, self.config.head_dim, like.dtype, like.device)
            for positions in (video_positions(grid[0], fps, self.config), tuple(map(float, range(length))))
        )
        return video.repeat_interleave(grid[1] * grid[2], 1), audio


def video_positions(frames: int, fps: float, config: BridgeConfig) -> tuple[float, ...]:
    """Return the positions of latent frames in units of audio latents."""
    if not config.first_frame_bias:
        return tuple(frame * config.audio_rate / (fps / FRAMES_PER_LATENT) for frame in range(frames))
    later = ((1 + (frame - 1) * FRAMES_PER_LATENT) / fps * config.audio_rate for frame in range(1, frames))
    return (0.0, *later)


def rotate_halves(x_BSNH: Tensor, table: Tensor) -> Tensor:
    """Rotate the first half of every head with the second one in float32, by a table ``[1, S, H/2, 2]``."""
    rotated = torch.empty_like(x_BSNH)
    for start in range(0, x_BSNH.shape[1], ROTATED_TOKENS):
        part = slice(start, start + ROTATED_TOKENS)
        cos, sin = table[:, part].unsqueeze(2).unbind(-1)
        first, second = x_BSNH[:, part].float().chunk(2, -1)
        rotated[:, part] = torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
    return rotated


@lru_cache(maxsize=KEPT_TABLES)
def position_table(positions: tuple[float, ...], head_dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return ``[1, S, H/2, 2]`` in float32, with values of ``dtype``; computed on the CPU, so that all ranks agree."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
    angles = torch.outer(torch.tensor(positions, dtype=torch.float32, device="cpu"), THETA**-exponents)
    return torch.stack((angles.cos(), angles.sin()), -1)[None].to(dtype).float().to(device)


def build_bridge(config: Mapping[str, Any]) -> DualTowerBridge:
    """Build the bridge of a ``bridge/config.json`` on the current default device and dtype."""
    return DualTowerBridge(BridgeConfig.from_dict(config), quant_config=engine_quantization(), prefix="bridge")
