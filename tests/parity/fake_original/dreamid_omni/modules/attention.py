"""Attention that the original computes with flash-attn, which needs CUDA: the runner has to replace it."""

from __future__ import annotations

import torch


def flash_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **_: object) -> torch.Tensor:
    """Refuse, as the original does without flash-attn."""
    raise AssertionError("flash-attn is not installed")
