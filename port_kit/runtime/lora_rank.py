"""Rank of the LoRA manager's buffers; see ``lora_rank`` in ``patches.md``."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any


def with_rank_of_adapter(bind: Callable[..., None]) -> Callable[..., None]:
    """Wrap ``DiffusionLoRAManager._bind_adapter_weights`` so that buffers have the rank of the adapter first.

    Upstream keeps the largest rank that any adapter had. Matrix products of another size round differently, so that the
    result of a request would depend on earlier requests.
    """

    @wraps(bind)
    def run(self: Any, lora_model: Any, scale: float) -> None:
        rank = self._get_smallest_valid_max_rank(max(lora.rank for lora in lora_model.loras.values()))
        if rank != self._max_lora_rank:
            self._max_lora_rank = 0  # makes the manager create the buffers again
            self._ensure_max_lora_rank(rank)
        bind(self, lora_model, scale)

    return run
