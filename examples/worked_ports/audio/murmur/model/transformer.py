"""The transformer of murmur, ported: joint attention (MM-DiT) of audio and text, then audio alone.

Audio and text are one sequence, audio first. It is padded once, at its end, and each rank holds consecutive tokens of
it: audio, text, or both. A block splits them into the rank's audio and text, applies the weights of each, and joins
them again for attention.

Shapes: B batch, C latent channels, L latent positions, T text tokens,
S tokens of this rank, N heads of this rank, H head size, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from cache_dit import ForwardPattern
from port_kit.parallel import linear
from port_kit.parallel.hsdp import meta_blocks
from port_kit.parallel.layers import attention, engine_quantization, sinusoids
from port_kit.parallel.sequence import SPBoundary, local_segment_lengths, make_sp_plan, pad_tokens, padded_length
from port_kit.parallel.token_conv import TokenConv
from port_kit.port import build_module
from torch import Tensor, nn
from torch.nn import functional as F
from vllm_omni.diffusion.cache.cachedit import CacheDiTAdapterConfig

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
        self.attn = attention(self.audio.heads, dim // heads, f"{prefix}.attn", role="self")

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


class MurmurTransformer(nn.Module):
    """Predicts the flow of latents from its noisy latents, the time and the bytes of a text.

    Args:
        latent: channels of the latents, C.
        d: width D of the tokens.
        heads: of every attention.
        inner: width of the feed-forward.
        pairs: blocks of audio and text.
        singles: blocks of audio alone.
        quant_config: quantization of the linears, None for none.
        prefix: path of this module in the pipeline.
    """

    _repeated_blocks: ClassVar = ["Block"]
    _layerwise_offload_blocks_attrs: ClassVar = ["joint_blocks", "single_blocks"]
    _hsdp_shard_conditions: ClassVar = [lambda _name, module: isinstance(module, Block)]
    # The joint sequence is gathered after the joint blocks: only then is the audio known to be divided evenly again.
    _sp_plan: ClassVar = make_sp_plan(
        {"joint_shard": (3, 4), "single_shard": (3, 4)}, {"joint_gather": (3,), "single_gather": (3,)}
    )
    _cache_dit_adapter_config: ClassVar = CacheDiTAdapterConfig(
        block_forward_patterns={"joint_blocks": ForwardPattern.Pattern_3, "single_blocks": ForwardPattern.Pattern_3},
        has_separate_cfg=True,
        check_forward_pattern=False,
    )
    packed_modules_mapping: ClassVar = {"qkv": ["q", "k", "v"], "up": ["w1", "w3"]}

    def __init__(
        self,
        *,
        latent: int,
        d: int,
        heads: int,
        inner: int,
        pairs: int,
        singles: int,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__()
        self.dim, self.head_dim = d, d // heads
        self.patch = TokenConv(latent, d, 7)
        self.text = nn.Embedding(256, d)
        self.time = linear.replicated(d, d, quant_config, f"{prefix}.time")
        sizes = d, heads, inner
        with meta_blocks():
            self.joint_blocks = nn.ModuleList(
                Block(*sizes, 2, quant_config, f"{prefix}.joint_blocks.{index}") for index in range(pairs)
            )
            self.single_blocks = nn.ModuleList(
                Block(*sizes, 1, quant_config, f"{prefix}.single_blocks.{index}") for index in range(singles)
            )
        self.head = nn.Linear(d, latent)
        self.joint_shard, self.joint_gather = SPBoundary(), SPBoundary()
        self.single_shard, self.single_gather = SPBoundary(), SPBoundary()
        self.eval().requires_grad_(False)

    def forward(self, latents: Tensor, time: Tensor, text: Tensor) -> Tensor:
        """Take ``[B, C, L]``, ``[B]`` in 0..1 and ``[B, T]``; return the flow, shaped as the latents."""
        length, words = latents.shape[2], self.text(text)
        audio = self.patch(latents.transpose(1, 2), length)
        condition = self.time(sinusoids(1000 * time, self.dim).to(audio.dtype)) + words.mean(1)
        angles = self._angles(length, latents.device)
        unrotated = angles.new_zeros(1, words.shape[1], *angles.shape[2:])

        joint, rope = torch.cat([audio, words], 1), torch.cat([angles, unrotated], 1)
        joint, rope = self.joint_shard(pad_tokens(joint), pad_tokens(rope))
        for block in self.joint_blocks:
            joint = block(joint, rope, condition, (length, words.shape[1]))
        (joint,) = self.joint_gather(joint)

        audio, rope = self.single_shard(pad_tokens(joint[:, :length]), pad_tokens(angles))
        for block in self.single_blocks:
            audio = block(audio, rope, condition, (length,))
        (audio,) = self.single_gather(audio)
        return self.head(audio[:, :length]).transpose(1, 2)

    def _angles(self, length: int, device: torch.device) -> Tensor:
        """Return rotary angles ``[1, L, 1, H / 2]``."""
        powers = torch.arange(0, self.head_dim, 2, device=device, dtype=torch.float32) / self.head_dim
        return (torch.arange(length, device=device)[:, None] * 10000.0**-powers)[None, :, None]


def _norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift


def _rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate the halves of each head of ``[B, S, N, H]``."""
    a, b = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, -1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -1).to(x.dtype)


def build_transformer(config: Mapping[str, Any]) -> MurmurTransformer:
    """Build the transformer of a ``transformer/config.json`` on the current default device and dtype.

    Inside an engine it is quantized as the engine's configuration says.
    """
    return build_module(MurmurTransformer, config, quant_config=engine_quantization(), prefix="transformer")
