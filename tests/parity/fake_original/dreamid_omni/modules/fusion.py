"""The fusion transformer restated from its description, with the original's parameter names and call signature.

Written from the mathematics, without code of the port: no fused projections, no padding, one sample per call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, pad, silu

from dreamid_omni.modules.attention import flash_attention


class RMSNorm(nn.Module):
    """Over the full width."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


class Attention(nn.Module):
    """Projections and norms of one attention; with ``fusion`` also those of the other stream."""

    def __init__(self, dim: int, heads: int, fusion: bool) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(dim), RMSNorm(dim)
        if fusion:
            self.k_fusion, self.v_fusion = nn.Linear(dim, dim), nn.Linear(dim, dim)
            self.pre_attn_norm_fusion, self.norm_k_fusion = nn.LayerNorm(dim, 1e-6), RMSNorm(dim)

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1))


class Modulation(nn.Module):
    """Six learned vectors."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.modulation = nn.Parameter(torch.zeros(1, 6, dim))


class Block(nn.Module):
    """One layer of one tower."""

    def __init__(self, dim: int, ffn: int, heads: int) -> None:
        super().__init__()
        self.norm3 = nn.LayerNorm(dim, 1e-6)
        self.self_attn, self.cross_attn = Attention(dim, heads, False), Attention(dim, heads, True)
        self.ffn = nn.Sequential(nn.Linear(dim, ffn), nn.GELU("tanh"), nn.Linear(ffn, dim))
        self.modulation = Modulation(dim)

    def attend(self, x: Tensor, m: Tensor, turns: Tensor) -> Tensor:
        """Add self-attention."""
        a, y = self.self_attn, plain_norm(x) * (1 + m[:, :, 1]) + m[:, :, 0]
        q, k = turn(a.split(a.norm_q(a.q(y))), turns), turn(a.split(a.norm_k(a.k(y))), turns)
        return x + m[:, :, 2] * a.o(flash_attention(q, k, a.split(a.v(y))).flatten(2))

    def cross(self, x: Tensor, m: Tensor, text: Tensor, turns: Tensor, other: Tensor, other_turns: Tensor) -> Tensor:
        """Add attention to the text and to the other stream, then the feed-forward."""
        a = self.cross_attn
        q, target = a.split(a.norm_q(a.q(self.norm3(x)))), a.pre_attn_norm_fusion(other)
        seen = flash_attention(q, a.split(a.norm_k(a.k(text))), a.split(a.v(text)))
        keys = turn(a.split(a.norm_k_fusion(a.k_fusion(target))), other_turns)
        seen = seen + flash_attention(turn(q, turns), keys, a.split(a.v_fusion(target)))
        x = x + a.o(seen.flatten(2))
        return x + m[:, :, 5] * self.ffn(plain_norm(x) * (1 + m[:, :, 4]) + m[:, :, 3])


class GatedConvs(nn.Module):
    """The gated convolutions after the audio stem's first one."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        hidden = -(-int(2 * (4 * dim) / 3) // 256) * 256
        self.w1, self.w3 = (nn.Conv1d(dim, hidden, 7, padding=3, bias=False) for _ in range(2))
        self.w2 = nn.Conv1d(hidden, dim, 7, padding=3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(silu(self.w1(x)) * self.w3(x))


class Head(nn.Module):
    """The last projection."""

    def __init__(self, dim: int, values: int) -> None:
        super().__init__()
        self.head = nn.Linear(dim, values)
        self.modulation = nn.Parameter(torch.zeros(1, 2, dim))

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        return self.head(plain_norm(x) * (1 + e + self.modulation[:, 1]) + e + self.modulation[:, 0])


class Tower(nn.Module):
    """One of the two towers, from a dict with the names of the original's JSON."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        dim, channels, text = config["dim"], config["in_dim"], config.get("text_dim", 4096)
        self.patch_size, self.heads = tuple(config["patch_size"]), config["num_heads"]
        self.freq_dim, self.text_len, self.is_audio = config["freq_dim"], config["text_len"], len(self.patch_size) == 1
        if self.is_audio:
            self.patch_embedding: nn.Module = nn.Sequential(
                nn.Conv1d(channels, dim, 7, padding=3), nn.SiLU(), GatedConvs(dim)
            )
        else:
            self.patch_embedding = nn.Conv3d(channels, dim, self.patch_size, self.patch_size)
        self.text_embedding = nn.Sequential(nn.Linear(text, dim), nn.GELU("tanh"), nn.Linear(dim, dim))
        self.time_embedding = nn.Sequential(nn.Linear(self.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(Block(dim, config["ffn_dim"], self.heads) for _ in range(config["num_layers"]))
        self.head = Head(dim, channels if self.is_audio else 4 * channels)
        self.head_dim = dim // self.heads

    def conditions(self, t: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return of times [S] their vectors [1, S, D] and six projections [1, S, 6, D], and the text [1, T, D]."""
        half = self.freq_dim // 2
        angles = t.double()[:, None] * 10_000 ** (-torch.arange(half, dtype=torch.float64, device=t.device) / half)
        e = self.time_embedding(torch.cat((angles.cos(), angles.sin()), -1).to(context.dtype))[None]
        text = self.text_embedding(pad(context, (0, 0, 0, self.text_len - len(context)))[None])
        return e, self.time_projection(e).unflatten(-1, (6, -1)), text


class FusionModel(nn.Module):
    """Two towers whose layers read each other."""

    def __init__(self, video_config: Mapping[str, Any], audio_config: Mapping[str, Any]) -> None:
        super().__init__()
        self.video_model, self.audio_model = Tower(video_config), Tower(audio_config)
        self.factor = audio_config.get("temporal_rope_scaling_factor")
        self.ready = False

    def set_rope_params(self) -> None:
        """The original computes its tables here, after it has left the meta device."""
        self.ready = True

    def forward(
        self,
        vid: Sequence[Tensor],
        audio: Sequence[Tensor],
        t: Tensor,
        vid_context: Sequence[Tensor],
        audio_context: Sequence[Tensor],
        vid_seq_len: int,
        audio_seq_len: int,
        freqs_scaling: Tensor | None = None,
        ref_ip_lengths: Sequence[Sequence[int]] = ((),),
        ref_audio_lengths: Sequence[Sequence[int]] = ((),),
        first_frame_is_clean: bool = False,
        slg_layer: int = 0,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Predict both flows of one sample; DreamID-Omni gives a scaling and references, Ovi the last two."""
        assert self.ready and len(vid) == len(audio) == 1
        v_tower, a_tower = self.video_model, self.audio_model
        patches = v_tower.patch_embedding(vid[0][None])
        grid = tuple(patches.shape[2:])
        v, a = patches.flatten(2).transpose(1, 2), a_tower.patch_embedding(audio[0].T[None]).transpose(1, 2)
        assert (v.shape[1], a.shape[1]) == (vid_seq_len, audio_seq_len)
        scaling = torch.tensor(self.factor, dtype=torch.float64) if freqs_scaling is None else freqs_scaling
        v_turns = video_turns(grid, sum(ref_ip_lengths[0]), v_tower.head_dim)
        a_turns = audio_turns(a.shape[1], ref_audio_lengths[0], a_tower.head_dim, scaling)
        v_times = t.repeat(v.shape[1])
        v_times[: grid[1] * grid[2] * first_frame_is_clean] = 0
        v_e, v_e0, v_text = v_tower.conditions(v_times, vid_context[0])
        a_e, a_e0, a_text = a_tower.conditions(t, audio_context[0])
        for index, (v_block, a_block) in enumerate(zip(v_tower.blocks, a_tower.blocks, strict=True)):
            if index == slg_layer > 0:
                continue
            v_m, a_m = v_block.modulation.modulation[None] + v_e0, a_block.modulation.modulation[None] + a_e0
            a1, v1 = a_block.attend(a, a_m, a_turns), v_block.attend(v, v_m, v_turns)
            a = a_block.cross(a1, a_m, a_text, a_turns, v1, v_turns)
            v = v_block.cross(v1, v_m, v_text, v_turns, a1, a_turns)
        frames, rows, columns = grid
        flow = v_tower.head(v, v_e).view(frames, rows, columns, 1, 2, 2, -1).permute(6, 0, 3, 1, 4, 2, 5)
        whole = flow.reshape(-1, frames, 2 * rows, 2 * columns)
        return [whole.bfloat16()], [a_tower.head(a, a_e)[0].bfloat16()]


def plain_norm(x: Tensor) -> Tensor:
    """LayerNorm without parameters."""
    return layer_norm(x, x.shape[-1:], eps=1e-6)


def turn(x: Tensor, turns: Tensor) -> Tensor:
    """Rotate adjacent pairs of x [B, S, N, H] by angles [S, H / 2]."""
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)))
    turned = torch.view_as_real(pairs * torch.polar(torch.ones_like(turns), turns)[None, :, None])
    return turned.flatten(3).to(x.dtype).bfloat16()


def frequencies(dim: int) -> Tensor:
    """Return dim / 2 rotary frequencies."""
    return 10_000 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)


def video_turns(grid: tuple[int, ...], references: int, head_dim: int) -> Tensor:
    """Return angles of (frame, row, column); the last frames are references, 150 apart."""
    frames, rows, columns = grid
    time = torch.arange(frames, dtype=torch.float64)
    time[frames - references :] = 150.0 * torch.arange(1, references + 1)
    side = 2 * (head_dim // 6)
    parts = (
        (time.view(-1, 1, 1), head_dim - 2 * side),
        (torch.arange(rows, dtype=torch.float64).view(1, -1, 1), side),
        (torch.arange(columns, dtype=torch.float64).view(1, 1, -1), side),
    )
    angles = [(p[..., None] * frequencies(d)).expand(frames, rows, columns, d // 2) for p, d in parts]
    return torch.cat(angles, -1).flatten(0, 2)


def audio_turns(length: int, references: Sequence[int], head_dim: int, scaling: Tensor) -> Tensor:
    """Return angles of the first part of each head; the rest does not turn. References are far behind."""
    positions = torch.arange(length, dtype=torch.float64)
    start, offset = length - sum(references), int(150 / scaling)
    for index, count in enumerate(references, 1):
        positions[start : start + count] = offset * index + torch.arange(count)
        start += count
    side = 2 * (head_dim // 6)
    angles = positions[:, None] * frequencies(head_dim - 2 * side) * scaling.double().cpu()
    return pad(angles, (0, side))
