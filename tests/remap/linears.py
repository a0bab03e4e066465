"""Linears with the attributes of vLLM's parallel ones, for any rank of any size, without process groups."""

from __future__ import annotations

import torch
from torch import nn


class Linear(nn.Module):
    """``kind`` is column, row, merged or qkv. The loader accepts complete shards and keeps this rank's part."""

    def __init__(self, kind: str, inputs: int, outputs: list[int], rank: int = 0, size: int = 1, kv: int = 0) -> None:
        super().__init__()
        self.kind, self.tp_rank, self.tp_size = kind, rank, size
        self.input_size, self.output_size = inputs, sum(outputs)
        split = kind != "row"
        self.input_size_per_partition = inputs if split else inputs // size
        self.output_size_per_partition = self.output_size // size if split else self.output_size
        if kind == "merged":
            self.output_sizes = outputs
        if kind == "qkv":
            self.head_size, self.total_num_heads, self.total_num_kv_heads = 1, outputs[0], kv
            self.num_heads = outputs[0] // size
            self.num_kv_heads, self.num_kv_head_replicas = max(1, kv // size), max(1, size // kv)
            self.output_size_per_partition = self.num_heads + 2 * self.num_kv_heads
        shape = (self.output_size_per_partition, self.input_size_per_partition)
        self.weight = nn.Parameter(torch.full(shape, float("nan")), requires_grad=False)
        self.weight.output_dim, self.weight.input_dim = 0, 1
        self.weight.weight_loader = self.load

    def load(self, parameter: nn.Parameter, tensor: torch.Tensor, shard: int | str | None = None) -> None:
        axis = 1 if self.kind == "row" else 0
        at, rank, size = 0, self.tp_rank, tensor.shape[axis] // self.tp_size
        if self.kind == "qkv":
            rows = {"q": self.num_heads, "k": self.num_kv_heads, "v": self.num_kv_heads}
            at = sum(rows[slot] for slot in "qkv"[: "qkv".index(str(shard))])
            size = rows[str(shard)]
            rank = rank if shard == "q" else rank // self.num_kv_head_replicas
        elif self.kind == "merged":
            at = sum(self.output_sizes[: int(shard)]) // self.tp_size  # type: ignore[arg-type] - merged ones have slots
        parameter.data.narrow(axis, at, size).copy_(tensor.narrow(axis, rank * size, size))
