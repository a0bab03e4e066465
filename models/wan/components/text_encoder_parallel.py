"""UMT5's encoder over tensor-parallel ranks: of its 11 GB in bfloat16, each rank holds its share.

The modules stay transformers' own; their matrices become vLLM's parallel linears under the same names, so that rules,
checkpoints and LoRA see no difference. Attention is divided by heads, the feed-forward by its width, the vocabulary by
words. What is left whole is small: norms, and tables of relative positions, of which a rank uses its heads' columns.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from port_kit.errors import ParallelError
from port_kit.parallel import linear
from port_kit.parallel.memory import materialize

if TYPE_CHECKING:
    from transformers import UMT5Config, UMT5EncoderModel


class LocalRelativeBias(nn.Embedding):
    """A table of one number a bucket and head, of which this rank reads its heads' columns."""

    def __init__(self, buckets: int, heads: int, place: int, ranks: int) -> None:
        super().__init__(buckets, heads)
        own = heads // ranks
        self.own = slice(place * own, (place + 1) * own)

    def forward(self, buckets: Tensor) -> Tensor:
        """Look up int64 ``[...]`` to ``[..., own heads]``."""
        return super().forward(buckets)[..., self.own]


def parallelize(model: UMT5EncoderModel, device: torch.device) -> None:
    """Divide an encoder that was made on the meta device over the ranks, and give each share memory on ``device``.

    Raises:
        ParallelError: the ranks do not divide the heads or the width of the feed-forward.
    """
    place, ranks = linear.tp_rank_and_size()
    config = model.config
    if config.num_heads % ranks or config.d_ff % ranks:
        raise ParallelError(
            f"tp {ranks} does not divide the text encoder's {config.num_heads} heads and its width of {config.d_ff}",
            code="parallel_degree",
            hint="use a degree that divides both",
        )
    with device:
        embedding = VocabParallelEmbedding(config.vocab_size, config.d_model, prefix="text_encoder.shared")
        model.shared = model.encoder.embed_tokens = embedding
        for index, block in enumerate(model.encoder.block):
            path = f"text_encoder.encoder.block.{index}.layer"
            _split_attention(block.layer[0].SelfAttention, config, f"{path}.0.SelfAttention", place, ranks)
            _split_feed_forward(block.layer[-1].DenseReluDense, config, f"{path}.1.DenseReluDense")
    materialize(model, device)


def _split_attention(attention: Any, config: UMT5Config, path: str, place: int, ranks: int) -> None:
    inner = config.num_heads * config.d_kv
    for name in ("q", "k", "v"):
        setattr(attention, name, linear.column(config.d_model, inner, None, f"{path}.{name}", bias=False))
    attention.o = linear.row(inner, config.d_model, None, f"{path}.o", bias=False)
    attention.n_heads, attention.inner_dim = config.num_heads // ranks, inner // ranks
    attention.relative_attention_bias = LocalRelativeBias(
        config.relative_attention_num_buckets, config.num_heads, place, ranks
    )


def _split_feed_forward(feed_forward: Any, config: UMT5Config, path: str) -> None:
    for name in ("wi_0", "wi_1"):
        setattr(feed_forward, name, linear.column(config.d_model, config.d_ff, None, f"{path}.{name}", bias=False))
    feed_forward.wo = linear.row(config.d_ff, config.d_model, None, f"{path}.wo", bias=False)
