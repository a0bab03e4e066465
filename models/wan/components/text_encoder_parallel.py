"""Tensor parallelism for UMT5's encoder (11 GB in bfloat16).

The modules are those of transformers with vLLM's parallel linears under the same names, so rules, checkpoints and
LoRA need no change. Attention is divided by heads, the feed-forward by its width, the vocabulary by rows. Norms and
tables of relative positions are small and replicated; each rank reads its heads' columns of the tables.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from port_kit.errors import ParallelError
from port_kit.parallel import linear
from port_kit.parallel.memory import materialize
from port_kit.upstream.checks import require

if TYPE_CHECKING:
    from transformers import UMT5Config, UMT5EncoderModel


class LocalRelativeBias(nn.Embedding):
    """Replicated relative bias ``[buckets, heads]`` that returns the columns of this rank's heads."""

    def __init__(self, buckets: int, heads: int, rank: int, size: int) -> None:
        super().__init__(buckets, heads)
        local = heads // size
        self.local_heads = slice(rank * local, (rank + 1) * local)

    def forward(self, buckets: Tensor) -> Tensor:
        """Look up int64 buckets ``[...]``; return ``[..., local heads]``."""
        return super().forward(buckets)[..., self.local_heads]


def parallelize(model: UMT5EncoderModel, device: torch.device) -> None:
    """Divide an encoder on the meta device over the ranks, and allocate this rank's part on ``device``.

    Raises:
        ParallelError: the number of ranks does not divide the heads or the width of the feed-forward.
    """
    require("vocabulary")
    require("umt5_layers")
    rank, size = linear.tp_rank_and_size()
    config = model.config
    if config.num_heads % size or config.d_ff % size:
        raise ParallelError(
            f"tp {size} does not divide the text encoder's {config.num_heads} heads and FFN width {config.d_ff}",
            code="parallel_degree",
            hint="use a tensor-parallel size that divides both",
        )
    with device:
        embedding = VocabParallelEmbedding(config.vocab_size, config.d_model, prefix="text_encoder.shared")
        model.shared = model.encoder.embed_tokens = embedding
        for index, block in enumerate(model.encoder.block):
            path = f"text_encoder.encoder.block.{index}.layer"
            _split_attention(block.layer[0].SelfAttention, config, f"{path}.0.SelfAttention", rank, size)
            _split_feed_forward(block.layer[-1].DenseReluDense, config, f"{path}.1.DenseReluDense")
    materialize(model, device)


def _split_attention(attention: Any, config: UMT5Config, path: str, rank: int, size: int) -> None:
    inner = config.num_heads * config.d_kv
    for name in ("q", "k", "v"):
        setattr(attention, name, linear.column(config.d_model, inner, None, f"{path}.{name}", bias=False))
    attention.o = linear.row(inner, config.d_model, None, f"{path}.o", bias=False)
    attention.n_heads, attention.inner_dim = config.num_heads // size, inner // size
    attention.relative_attention_bias = LocalRelativeBias(
        config.relative_attention_num_buckets, config.num_heads, rank, size
    )


def _split_feed_forward(feed_forward: Any, config: UMT5Config, path: str) -> None:
    for name in ("wi_0", "wi_1"):
        setattr(feed_forward, name, linear.column(config.d_model, config.d_ff, None, f"{path}.{name}", bias=False))
    feed_forward.wo = linear.row(config.d_ff, config.d_model, None, f"{path}.wo", bias=False)
