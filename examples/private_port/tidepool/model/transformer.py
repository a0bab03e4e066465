"""Tidepool's transformer: noisy patches and a prompt to a velocity.

Shape suffixes: B batch, V video tokens, D width, N heads of this rank, H head dim, P values of a patch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from port_kit.parallel import linear
from port_kit.parallel.sequence import PaddedAttention, SPBoundary, make_sp_plan, pad_tokens, padded_length
from tidepool.config import BYTES

CHANNELS = 3


class Block(nn.Module):
    """Attention, then a feed-forward; both modulated by the prompt and the time."""

    def __init__(self, config: Mapping[str, Any], prefix: str) -> None:
        super().__init__()
        dim, heads = config["dim"], config["heads"]
        self.qkv = linear.qkv(dim, dim // heads, heads, None, f"{prefix}.qkv")
        self.out = linear.row(dim, dim, None, f"{prefix}.out")
        self.up = linear.column(dim, config["ffn_dim"], None, f"{prefix}.up")
        self.down = linear.row(config["ffn_dim"], dim, None, f"{prefix}.down")
        self.modulation = linear.replicated(dim, 4 * dim, None, f"{prefix}.modulation")
        self.heads = self.qkv.num_heads  # of this rank
        self.attn = PaddedAttention(
            num_heads=self.heads,
            head_size=dim // heads,
            num_kv_heads=self.heads,
            softmax_scale=(dim // heads) ** -0.5,
            causal=False,
            prefix=f"{prefix}.attn",
        )

    def forward(self, x_BVD: Tensor, condition_BD: Tensor, length: int | None) -> Tensor:
        """Return the tokens after this block; ``length`` as :meth:`PaddedAttention.forward` takes it."""
        shift, scale, shift_mlp, scale_mlp = self.modulation(condition_BD)[:, None].chunk(4, -1)
        parts = self.qkv(_norm(x_BVD) * (1 + scale) + shift).chunk(3, -1)
        q_BVNH, k_BVNH, v_BVNH = (part.unflatten(-1, (self.heads, -1)) for part in parts)
        x_BVD = x_BVD + self.out(self.attn(q_BVNH, k_BVNH, v_BVNH, length).flatten(2))
        hidden = nn.functional.gelu(self.up(_norm(x_BVD) * (1 + scale_mlp) + shift_mlp))
        return x_BVD + self.down(hidden)


class TidepoolTransformer(nn.Module):
    """Patches in, velocities out. The class attributes are what vLLM-Omni reads for parallelism and offload."""

    _sp_plan: ClassVar = make_sp_plan({"shard": (3,)}, {"gather": (3,)})
    _hsdp_shard_conditions: ClassVar = [lambda _name, module: isinstance(module, Block)]
    _layerwise_offload_blocks_attrs: ClassVar = ["blocks"]
    _repeated_blocks: ClassVar = ["Block"]

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.patch_size = tuple(config["patch"])
        dim, values = config["dim"], CHANNELS * math.prod(self.patch_size)
        self.patch = linear.replicated(values, dim, None, "patch")
        self.bytes = nn.Embedding(BYTES, dim)
        self.time = linear.replicated(dim, dim, None, "time")
        self.blocks = nn.ModuleList(Block(config, f"blocks.{index}") for index in range(config["layers"]))
        self.final = linear.replicated(dim, values, None, "final")
        self.shard, self.gather = SPBoundary(), SPBoundary()

    def forward(self, video: Tensor, time: Tensor, prompt: Tensor) -> Tensor:
        """Predict the velocity of (B, 3, F, H, W) at time (B,) in [0, 1] for a prompt of bytes (B, T)."""
        x_BVP, grid = self._patches(video)
        length = x_BVP.shape[1]
        x_BVD = self.patch(x_BVP)
        x_BVD = x_BVD + _sinusoid(torch.arange(length, device=video.device), x_BVD.shape[-1]).to(x_BVD.dtype)
        moment = _sinusoid(1000 * time, x_BVD.shape[-1]).to(x_BVD.dtype)
        condition_BD = nn.functional.silu(self.time(moment) + self.bytes(prompt).mean(1))
        (x_BVD,) = self.shard(pad_tokens(x_BVD))
        for block in self.blocks:
            x_BVD = block(x_BVD, condition_BD, padded_length(length))
        (x_BVD,) = self.gather(x_BVD)
        return self._frames(self.final(_norm(x_BVD[:, :length])), grid)

    def _patches(self, video: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """Cut (B, 3, F, H, W) into tokens; the values of a token are ordered (channel, frame, row, column)."""
        batch, channels, *sizes = video.shape
        f, h, w = grid = tuple(size // patch for size, patch in zip(sizes, self.patch_size, strict=True))
        pf, ph, pw = self.patch_size
        cut = video.reshape(batch, channels, f, pf, h, ph, w, pw).permute(0, 2, 4, 6, 1, 3, 5, 7)
        return cut.reshape(batch, f * h * w, -1), grid

    def _frames(self, x_BVP: Tensor, grid: tuple[int, ...]) -> Tensor:
        (f, h, w), (pf, ph, pw) = grid, self.patch_size
        whole = x_BVP.reshape(-1, f, h, w, CHANNELS, pf, ph, pw).permute(0, 4, 1, 5, 2, 6, 3, 7)
        return whole.reshape(-1, CHANNELS, f * pf, h * ph, w * pw)


def _norm(x: Tensor) -> Tensor:
    return nn.functional.layer_norm(x, x.shape[-1:])


def _sinusoid(positions: Tensor, dim: int) -> Tensor:
    """Return (len(positions), dim): cosines, then sines, of frequencies from 1 down to 1/10000."""
    frequencies = torch.exp(-math.log(10_000) * torch.arange(dim // 2, device=positions.device) / (dim // 2))
    angles = positions.float()[:, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), -1)


def build_transformer(config: Mapping[str, Any]) -> TidepoolTransformer:
    """Build the transformer of a ``transformer/config.json`` on the current default device and dtype."""
    return TidepoolTransformer(config)
