"""The attention sub-layers of a block: self-attention, and cross-attention to the text and to the other stream.

Shape suffixes: B batch, S tokens of this stream, O tokens of the other stream, T text tokens, N heads of this rank,
H head dim, D width, E width of the other stream.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor, nn

from port_kit.models.wan.transformer import fused_ops
from port_kit.models.wan.transformer.fused_ops import PartialSums
from port_kit.models.wan.transformer.layers import QKNorm, tp_square_sums
from port_kit.parallel import linear
from port_kit.parallel.sequence import PaddedAttention

if TYPE_CHECKING:
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

    from port_kit.models.wan.transformer.config import TowerConfig
    from port_kit.parallel.fp8_rows import Rows


class Reader(NamedTuple):
    """A norm, and the linear that reads it."""

    norm: nn.LayerNorm
    linear: nn.Module


@dataclass(frozen=True)
class RotaryContext:
    """Positions of the tokens of a stream.

    Attributes:
        rope: table of this rank's tokens, ``[1, S, H/2, 2]``.
        length: tokens of all ranks without padding; None if the stream is not padded for sharding.
    """

    rope: Tensor
    length: int | None = None


#: A clip has about 100 times more video than audio tokens, so ranks exchange audio only.
GatherOperand = Literal["kv", "q"] | None


class SelfAttention(nn.Module):
    """Self-attention of a stream with rotary positions."""

    def __init__(self, config: TowerConfig, quant: QuantizationConfig | None, prefix: str) -> None:
        super().__init__()
        dim = config.dim
        self.qkv = linear.qkv(dim, config.head_dim, config.num_heads, quant, f"{prefix}.qkv")
        self.o = linear.row(dim, dim, quant, f"{prefix}.o")
        self.norm_q = QKNorm(dim, config.eps)
        self.norm_k = QKNorm(dim, config.eps)
        self.heads = self.qkv.num_heads
        gather: GatherOperand = "kv" if config.modality == "audio" else None
        self.attn = _attention(config, self.heads, f"{prefix}.attn", role="self", gather=gather)

    def forward(self, x_BSD: Rows, rotary: RotaryContext) -> PartialSums:
        """Attend normalized tokens; return ``[B, S, D]``, possibly as partial sums."""
        q, k, v = self.qkv(x_BSD).chunk(3, -1)
        q_squares, k_squares = tp_square_sums(q, k)
        (q,) = self.norm_q(q, q_squares, rotary.rope)
        (k,) = self.norm_k(k, k_squares, rotary.rope)
        attended = self.attn(*(split_heads(t, self.heads) for t in (q, k, v)), rotary.length)
        return linear.row_parallel_partials(self.o, attended.flatten(2))


class CrossAttention(nn.Module):
    """Layers of the attention of a stream to its text, whose keys have no positions."""

    def __init__(self, config: TowerConfig, quant: QuantizationConfig | None, prefix: str) -> None:
        super().__init__()
        dim, eps = config.dim, config.eps
        self.norm = nn.LayerNorm(dim, eps)
        self.q = linear.column(dim, dim, quant, f"{prefix}.q")
        self.kv = linear.merged(dim, [dim, dim], quant, f"{prefix}.kv")
        self.o = linear.row(dim, dim, quant, f"{prefix}.o")
        self.norm_q = QKNorm(dim, eps)
        self.norm_k = QKNorm(dim, eps)
        self.heads = self.q.output_size_per_partition // config.head_dim
        # every rank holds the complete text
        self.text_attn = _attention(
            config, self.heads, f"{prefix}.text_attn", role="cross", skip_sequence_parallel=True
        )

    @property
    def query_reader(self) -> Reader:
        """Reads this stream's tokens."""
        return Reader(self.norm, self.q)

    def project_text(self, text_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and values of a text, ``[B, T, D]`` of this rank's heads; they depend on no timestep."""
        k, v = self.kv(text_BTD).chunk(2, -1)
        (k,) = self.norm_k(k, *tp_square_sums(k))
        return k, v

    def _attend_text(self, q_BSD: Tensor, text_kv: tuple[Tensor, Tensor]) -> Tensor:
        return self.text_attn(*(split_heads(t, self.heads) for t in (q_BSD, *text_kv)))

    def _attend_text_only(self, q_BSD: Tensor, text_kv: tuple[Tensor, Tensor]) -> PartialSums:
        (q,) = self.norm_q(q_BSD, *tp_square_sums(q_BSD))
        return linear.row_parallel_partials(self.o, self._attend_text(q, text_kv).flatten(2))


class TextAttention(CrossAttention):
    """Attention of a stream to its text."""

    def forward(self, x_BSD: Rows, text_kv: tuple[Tensor, Tensor]) -> PartialSums:
        """Return ``[B, S, D]``, possibly as partial sums.

        Args:
            x_BSD: tokens after :attr:`norm`.
            text_kv: result of :meth:`project_text`.
        """
        return self._attend_text_only(self.q(x_BSD), text_kv)


class FusionAttention(CrossAttention):
    """Attention of a stream to its text and to the other stream: one query, two sets of keys, one output projection.

    Keys and values of the other stream are projected from its width to the width and heads of this stream. Its keys
    have rotary positions, so the query is rotated for them.
    """

    def __init__(self, config: TowerConfig, other: TowerConfig, quant: QuantizationConfig | None, prefix: str) -> None:
        super().__init__(config, quant, prefix)
        self.kv_fusion = linear.merged(other.dim, [config.dim, config.dim], quant, f"{prefix}.kv_fusion")
        self.norm_k_fusion = QKNorm(config.dim, config.eps)
        self.pre_attn_norm_fusion = nn.LayerNorm(other.dim, config.eps)
        gather: GatherOperand = "q" if config.modality == "audio" else "kv"
        self.fusion_attn = _attention(config, self.heads, f"{prefix}.fusion_attn", role="cross", gather=gather)

    @property
    def key_reader(self) -> Reader:
        """Reads the other stream's tokens."""
        return Reader(self.pre_attn_norm_fusion, self.kv_fusion)

    def forward(
        self,
        x_BSD: Rows,
        text_kv: tuple[Tensor, Tensor],
        rotary: RotaryContext,
        other_BOE: Rows,
        other_rotary: RotaryContext,
    ) -> PartialSums:
        """Return ``[B, S, D]``, possibly as partial sums; the other stream is not attended if it has no tokens.

        Args:
            x_BSD: this stream's tokens after :attr:`norm`.
            text_kv: result of :meth:`project_text` for this stream's text.
            rotary: of this stream.
            other_BOE: the other stream's tokens after :attr:`pre_attn_norm_fusion`.
            other_rotary: of the other stream.
        """
        q = self.q(x_BSD)
        if not other_BOE.shape[1]:
            return self._attend_text_only(q, text_kv)
        k, v = self.kv_fusion(other_BOE).chunk(2, -1)
        q_squares, k_squares = tp_square_sums(q, k)
        q, q_rotated = self.norm_q(q, q_squares, rotary.rope, keep_unrotated=True)
        (k,) = self.norm_k_fusion(k, k_squares, other_rotary.rope)
        attended = self._attend_text(q, text_kv)
        fused = self.fusion_attn(*(split_heads(t, self.heads) for t in (q_rotated, k, v)), other_rotary.length)
        rows = fused_ops.add_heads(attended.flatten(2), fused.flatten(2), self.o)
        return linear.row_parallel_partials(self.o, rows)


def split_heads(x_BSD: Tensor, heads: int) -> Tensor:
    """Return a view ``[B, S, N, H]``; ``x`` may be a slice of a fused projection."""
    return torch.unflatten(x_BSD, -1, (heads, -1))


def _attention(
    config: TowerConfig,
    heads: int,
    prefix: str,
    *,
    role: str,
    skip_sequence_parallel: bool = False,
    gather: GatherOperand = None,
) -> PaddedAttention:
    return PaddedAttention(
        num_heads=heads,
        head_size=config.head_dim,
        causal=False,
        softmax_scale=config.head_dim**-0.5,
        num_kv_heads=heads,
        prefix=prefix,
        role=role,
        skip_sequence_parallel=skip_sequence_parallel,
        gather=gather,
        # attention to few keys has nothing to gain from eight bits
        disable_kv_quant=not (role == "self" and config.modality == "video"),
        allow_fp32_fallback=True,  # FlashAttention has no float32
    )
