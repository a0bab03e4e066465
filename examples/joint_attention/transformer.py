"""A transformer with joint attention (MM-DiT): audio and text tokens with weights of their own, then audio alone.

Audio and text are one sequence, audio first. It is padded once, at its end, and each rank holds consecutive tokens of
it: audio, text, or both. A block splits them into the rank's audio and text, applies the weights of each, and joins
them again for attention.

Shapes: B batch, A audio tokens, T text tokens, S tokens of this rank, N heads of this rank, H head size, D width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from vllm_omni.diffusion.config import get_current_diffusion_config_or_none

from port_kit.parallel import linear
from port_kit.parallel.hsdp import meta_blocks
from port_kit.parallel.sequence import (
    PaddedAttention,
    SPBoundary,
    local_segment_lengths,
    make_sp_plan,
    pad_tokens,
    padded_length,
)
from port_kit.parallel.token_conv import TokenConv

if TYPE_CHECKING:
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

#: Index of the audio and of the text in a joint sequence.
AUDIO, TEXT = 0, 1


class ConvFeedForward(nn.Module):
    """Feed-forward with kernels of three tokens, of the audio."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate = TokenConv(dim, hidden, 3, role="column")
        self.up = TokenConv(dim, hidden, 3, role="column")
        self.down = TokenConv(hidden, dim, 3, role="row")

    def forward(self, x: Tensor, lengths: Sequence[int]) -> Tensor:
        """Return ``[B, S, D]``; ``lengths`` are those of all segments, audio first."""
        hidden = F.silu(self.gate(x, lengths, segment=AUDIO)) * self.up(x, lengths, segment=AUDIO)
        return self.down(hidden, lengths, segment=AUDIO)


class LinearFeedForward(nn.Module):
    """Feed-forward of single tokens, of the text."""

    def __init__(self, dim: int, hidden: int, quant: QuantizationConfig | None, prefix: str) -> None:
        super().__init__()
        self.up = linear.merged(dim, [hidden, hidden], quant, f"{prefix}.up")
        self.down = linear.row(hidden, dim, quant, f"{prefix}.down")

    def forward(self, x: Tensor, lengths: Sequence[int]) -> Tensor:
        """Return ``[B, S, D]``; lengths are not needed."""
        gate, up = self.up(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)


class StreamLayer(nn.Module):
    """Weights of one stream in one block: everything except for attention."""

    def __init__(
        self, dim: int, heads: int, feed_forward: nn.Module, quant: QuantizationConfig | None, prefix: str
    ) -> None:
        super().__init__()
        self.modulation = linear.replicated(dim, 6 * dim, quant, f"{prefix}.modulation")
        self.qkv = linear.qkv(dim, dim // heads, heads, quant, f"{prefix}.qkv")
        self.norm_q, self.norm_k = nn.RMSNorm(dim // heads), nn.RMSNorm(dim // heads)
        self.out = linear.row(dim, dim, quant, f"{prefix}.out")
        self.feed_forward = feed_forward
        self.heads = self.qkv.num_heads

    def modulate(self, condition: Tensor) -> tuple[Tensor, ...]:
        """Return shift, scale and gate of attention and of the feed-forward, ``[B, 1, D]`` each."""
        return self.modulation(F.silu(condition))[:, None].chunk(6, -1)

    def project(self, x: Tensor, modulation: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values ``[B, S, N, H]``."""
        shift, scale = modulation[:2]
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in self.qkv(_norm(x, shift, scale)).chunk(3, -1))
        return self.norm_q(q), self.norm_k(k), v

    def finish(self, x: Tensor, attended: Tensor, modulation: Sequence[Tensor], lengths: Sequence[int]) -> Tensor:
        """Return the tokens ``[B, S, D]`` after attention, of which ``attended`` is the result, and feed-forward."""
        _, _, gate, shift, scale, feed_forward_gate = modulation
        x = x + gate * self.out(attended)
        return x + feed_forward_gate * self.feed_forward(_norm(x, shift, scale), lengths)


class Block(nn.Module):
    """One layer: attention over the tokens of all streams, and the weights of each stream.

    Args:
        dim: width D.
        heads: heads of attention over all ranks.
        hidden: width of the feed-forward.
        streams: 2 for audio and text, 1 for audio alone.
        quant: quantization of the linears.
        prefix: path of this module in the pipeline.
    """

    def __init__(
        self, dim: int, heads: int, hidden: int, streams: int, quant: QuantizationConfig | None, prefix: str
    ) -> None:
        super().__init__()
        self.audio = StreamLayer(dim, heads, ConvFeedForward(dim, hidden), quant, f"{prefix}.audio")
        if streams == 2:
            feed_forward = LinearFeedForward(dim, hidden, quant, f"{prefix}.text.feed_forward")
            self.text = StreamLayer(dim, heads, feed_forward, quant, f"{prefix}.text")
        self.attn = PaddedAttention(
            num_heads=self.audio.heads,
            head_size=dim // heads,
            num_kv_heads=self.audio.heads,
            softmax_scale=(dim // heads) ** -0.5,
            causal=False,
            prefix=f"{prefix}.attn",
        )

    def forward(self, hidden_states: Tensor, rope: Tensor, condition: Tensor, lengths: tuple[int, ...]) -> Tensor:
        """Return the tokens ``[B, S, D]`` after this layer.

        Args:
            hidden_states: ``[B, S, D]``, this rank's tokens of all streams.
            rope: ``[1, S, 1, H / 2]``, their angles.
            condition: ``[B, D]``.
            lengths: tokens of each stream, over all ranks and without padding.
        """
        layers = [self.audio, self.text] if len(lengths) == 2 else [self.audio]
        local = local_segment_lengths(lengths, hidden_states.shape[1])  # a rank may have no token of a stream
        parts = hidden_states.split(local, 1)
        modulations = [layer.modulate(condition) for layer in layers]
        projected = [layer.project(x, m) for layer, x, m in zip(layers, parts, modulations, strict=True)]
        q, k, v = (torch.cat(tensors, 1) for tensors in zip(*projected, strict=True))
        attended = self.attn(_rotate(q, rope), _rotate(k, rope), v, padded_length(sum(lengths)))
        results = attended.flatten(2).split(local, 1)
        given = zip(layers, parts, results, modulations, strict=True)
        return torch.cat([layer.finish(x, y, m, lengths) for layer, x, y, m in given], 1)


class JointTransformer(nn.Module):
    """Predicts the flow of audio latents from noisy latents, the time and states of a text.

    Args:
        channels: channels of the latents.
        text_dim: width of the text states.
        dim: width D.
        heads: heads of attention.
        hidden: width of the feed-forward.
        joint_layers: blocks of audio and text.
        single_layers: blocks of audio alone.
        quant_config: quantization of the linears.
        prefix: path of this module in the pipeline.
    """

    # The joint sequence is gathered after the joint blocks: only then is the audio known to be divided evenly again.
    _sp_plan: ClassVar = make_sp_plan(
        {"joint_shard": (3, 4), "single_shard": (3, 4)}, {"joint_gather": (3,), "single_gather": (3,)}
    )
    _hsdp_shard_conditions: ClassVar = [lambda _name, module: isinstance(module, Block)]
    _layerwise_offload_blocks_attrs: ClassVar = ["joint_blocks", "single_blocks"]
    _repeated_blocks: ClassVar = ["Block"]

    def __init__(
        self,
        *,
        channels: int,
        text_dim: int,
        dim: int,
        heads: int,
        hidden: int,
        joint_layers: int,
        single_layers: int,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__()
        self.dim, self.head_dim = dim, dim // heads
        self.audio_in = TokenConv(channels, dim, 7)
        self.text_in = nn.Linear(text_dim, dim)
        self.time = linear.replicated(dim, dim, quant_config, f"{prefix}.time")
        sizes = dim, heads, hidden
        with meta_blocks():
            self.joint_blocks = nn.ModuleList(
                Block(*sizes, 2, quant_config, f"{prefix}.joint_blocks.{index}") for index in range(joint_layers)
            )
            self.single_blocks = nn.ModuleList(
                Block(*sizes, 1, quant_config, f"{prefix}.single_blocks.{index}") for index in range(single_layers)
            )
        self.head = nn.Linear(dim, channels)
        self.joint_shard, self.joint_gather = SPBoundary(), SPBoundary()
        self.single_shard, self.single_gather = SPBoundary(), SPBoundary()

    def forward(self, latents: Tensor, time: Tensor, text: Tensor) -> Tensor:
        """Return the flow, shaped as the latents.

        Args:
            latents: ``[B, A, channels]``.
            time: ``[B]``, in 0..1.
            text: ``[B, T, text_dim]``, unpadded.
        """
        lengths = latents.shape[1], text.shape[1]
        audio, words = self.audio_in(latents, lengths[AUDIO]), self.text_in(text)
        condition = self.time(_sinusoids(1000 * time, self.dim).to(audio.dtype)) + words.mean(1)
        angles = self._angles(lengths[AUDIO], latents.device)
        unrotated = angles.new_zeros(1, lengths[TEXT], *angles.shape[2:])

        joint, rope = torch.cat([audio, words], 1), torch.cat([angles, unrotated], 1)
        joint, rope = self.joint_shard(pad_tokens(joint), pad_tokens(rope))
        for block in self.joint_blocks:
            joint = block(joint, rope, condition, lengths)
        (joint,) = self.joint_gather(joint)

        audio, rope = self.single_shard(pad_tokens(joint[:, : lengths[AUDIO]]), pad_tokens(angles))
        for block in self.single_blocks:
            audio = block(audio, rope, condition, lengths[:1])
        (audio,) = self.single_gather(audio)
        return self.head(audio[:, : lengths[AUDIO]])

    def _angles(self, length: int, device: torch.device) -> Tensor:
        """Return rotary angles ``[1, A, 1, H / 2]``."""
        powers = torch.arange(0, self.head_dim, 2, device=device, dtype=torch.float32) / self.head_dim
        return (torch.arange(length, device=device)[:, None] * 10000.0**-powers)[None, :, None]


def _norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift


def _rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate the halves of each head of ``[B, S, N, H]``."""
    a, b = x.float().chunk(2, -1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -1).to(x.dtype)


def _sinusoids(values: Tensor, dim: int) -> Tensor:
    """Return float32 ``[..., D]``: cosines of geometric frequencies, then sines."""
    powers = torch.arange(dim // 2, dtype=torch.float32, device=values.device) / -(dim // 2)
    angles = values.float().unsqueeze(-1) * torch.exp(powers * math.log(10000.0))
    return torch.cat((angles.cos(), angles.sin()), -1)


def build_transformer(config: Mapping[str, Any]) -> JointTransformer:
    """Build the transformer of a ``transformer/config.json`` on the current default device and dtype."""
    engine = get_current_diffusion_config_or_none()
    quant = engine.quantization_config if engine is not None else None
    return JointTransformer(**config, quant_config=quant, prefix="transformer")
