"""MMAudio's 16 kHz mel autoencoder: waveforms to latents, latents to log-mel spectrograms.

Shapes: B clips, S samples at 16 kHz, M mel frames (62.5 Hz, 256 samples each), L latents (31.25 Hz, 2 mel frames
each), 80 mel bands, 20 latent channels, W channels of a layer, K taps of a convolution.

The network is magnitude preserving (Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion
Models", section 2): filters have unit norm, activations are rescaled to unit magnitude, and the constants below keep
variance through SiLU and through sums. A checkpoint holds raw filters; its rule set normalizes each on loading
(:data:`port_kit.models.wan.weights.component_rules.AUDIO_VAE`), so that the modules here are plain convolutions.

Convolutions compute in the dtype of the weights; norms and the mel front end in float32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from port_kit.errors import InputError, PortKitError
from port_kit.models.wan.components.mel import LogMel

#: Width of each resolution divided by ``hidden_dim``; resolution 0 is the mel frame rate.
WIDTHS = (1, 2, 4)
#: Resolution after which the encoder halves the rate. The decoder doubles the rate after resolution 1, before its
#: blocks of this resolution.
HALVING_AFTER = 0

_BLOCKS = 2
_CLIP = 256.0
_SILU_GAIN = 1.0 / 0.596  # the standard deviation of SiLU of a normal variable is 0.596
_SHARE = 0.3  # weight of the residual path in a sum
_EPSILON = 1e-4


class AudioVAE(nn.Module):
    """The autoencoder with its mel front end.

    Args:
        data_dim: mel bands.
        embed_dim: latent channels.
        hidden_dim: channels at the mel frame rate.
    """

    data_mean: torch.Tensor
    data_std: torch.Tensor

    def __init__(self, data_dim: int, embed_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.mel = LogMel(data_dim)
        self.register_buffer("data_mean", torch.zeros(1, data_dim, 1))
        self.register_buffer("data_std", torch.ones(1, data_dim, 1))
        self.encoder = _Encoder(data_dim, hidden_dim, 2 * embed_dim)
        self.decoder = _Decoder(embed_dim, hidden_dim, data_dim)

    @torch.no_grad()
    def encode(self, wave: torch.Tensor) -> torch.Tensor:
        """Encode waveforms ``[B, S]`` at 16 kHz to the mean of their posterior ``[B, 20, S // 512]``.

        Raises:
            InputError: the input is not a batch of waveforms, or is too short for the mel front end.
        """
        return self.encode_mel(self.mel(wave))[:, : self.embed_dim]

    @torch.no_grad()
    def encode_mel(self, mel: torch.Tensor) -> torch.Tensor:
        """Encode log-mel frames ``[B, 80, M]`` to mean and log-variance ``[B, 40, M // 2]``, in this order."""
        return self.encoder((mel - self.data_mean) / self.data_std)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode latents ``[B, 20, L]`` to log-mel frames ``[B, 80, 2 L]``.

        Raises:
            InputError: the number of dimensions or channels is wrong.
        """
        if latents.ndim != 3 or latents.shape[1] != self.embed_dim:
            raise InputError(
                f"latents have shape {tuple(latents.shape)}; expected [B, {self.embed_dim}, L]",
                code="component_input",
            )
        return self.decoder(latents) * self.data_std + self.data_mean


def build_audio_vae(config: Mapping[str, Any]) -> AudioVAE:
    """Build the autoencoder with uninitialized weights on the current default device and dtype.

    Args:
        config: content of ``audio_vae/config.json``: ``data_dim``, ``embed_dim`` and ``hidden_dim``.

    Raises:
        PortKitError: a key is missing.
    """
    keys = ("data_dim", "embed_dim", "hidden_dim")
    missing = [key for key in keys if key not in config]
    if missing:
        raise PortKitError(
            f"the audio VAE's configuration lacks {', '.join(missing)}",
            code="component_config",
            hint="use the audio_vae/config.json that `port-kit download` writes",
        )
    return AudioVAE(*(int(config[key]) for key in keys))


class _Conv(nn.Module):
    """Convolution without bias that keeps the length; casts its input to the dtype of its weight."""

    def __init__(self, inputs: int, outputs: int, taps: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, taps))

    def forward(self, x: torch.Tensor, gain: torch.Tensor | None = None) -> torch.Tensor:
        weight = self.weight if gain is None else self.weight * gain
        return F.conv1d(x.to(weight.dtype), weight, padding=weight.shape[-1] // 2)


class _Block(nn.Module):
    """Residual block of two convolutions; ``[B, inputs, L]`` to ``[B, outputs, L]``."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = _Conv(inputs, outputs, 3)
        self.conv2 = _Conv(outputs, outputs, 3)
        self.shortcut = _Conv(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = _unit_magnitude(x, dim=1)
        h = self.conv2(_silu(self.conv1(_silu(x))))
        return _blend(x if self.shortcut is None else self.shortcut(x), h)


class _Attention(nn.Module):
    """Attention with one head over time; queries, keys and values have unit magnitude at each position."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = _Conv(width, 3 * width, 1)
        self.output = _Conv(width, width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # q, k and v are interleaved: output channel 3 c + s of qkv is channel c of q (s=0), k (1) or v (2).
        qkv = _unit_magnitude(self.qkv(x).unflatten(1, (-1, 3)), dim=1)
        q, k, v = qkv.permute(2, 0, 3, 1).unsqueeze(2)
        h = F.scaled_dot_product_attention(q, k, v)
        return _blend(x, self.output(h.squeeze(1).transpose(1, 2)))


class _Halve(nn.Module):
    """Downsampling by 2: mean of neighbors between two pointwise convolutions; an odd last frame is dropped."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.before = _Conv(width, width, 1)
        self.after = _Conv(width, width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.after(F.avg_pool1d(self.before(x), kernel_size=2))


class _Double(nn.Module):
    """Upsampling by 2: each frame twice, then a convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = _Conv(width, width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x.repeat_interleave(2, dim=-1))


class _Encoder(nn.Module):
    """Normalized mel frames ``[B, inputs, M]`` to moments ``[B, outputs, M // 2]``."""

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        widths = [hidden * factor for factor in WIDTHS]
        self.input = _Conv(inputs, hidden, 3)
        entries = [hidden, *widths[:-1]]
        self.stages = nn.ModuleList(_stage(a, b, _BLOCKS) for a, b in zip(entries, widths, strict=True))
        self.downsample = _Halve(widths[HALVING_AFTER])
        self.middle = _middle(widths[-1])
        self.output = _Conv(widths[-1], outputs, 3)
        self.gain = nn.Parameter(torch.empty(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.input(x)
        for level, stage in enumerate(self.stages):
            x = _run_clipped(stage, x)
            if level == HALVING_AFTER:
                x = self.downsample(x)
        x = self.middle(x).clamp(-_CLIP, _CLIP)
        return self.output(_silu(x), gain=self.gain + 1)


class _Decoder(nn.Module):
    """Latents ``[B, inputs, L]`` to normalized mel frames ``[B, outputs, 2 L]``; stages are in order of resolution."""

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        widths = [hidden * factor for factor in WIDTHS]
        self.input = _Conv(inputs, widths[-1], 3)
        self.middle = _middle(widths[-1])
        entries = [*widths[1:], widths[-1]]
        self.stages = nn.ModuleList(_stage(a, b, _BLOCKS + 1) for a, b in zip(entries, widths, strict=True))
        self.upsample = _Double(widths[HALVING_AFTER + 1])
        self.output = _Conv(hidden, outputs, 3)
        self.gain = nn.Parameter(torch.empty(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.middle(self.input(x)).clamp(-_CLIP, _CLIP)
        for level, stage in reversed(list(enumerate(self.stages))):
            x = _run_clipped(stage, x)
            if level == HALVING_AFTER + 1:
                x = self.upsample(x)
        return self.output(_silu(x), gain=self.gain + 1)


def _stage(inputs: int, outputs: int, blocks: int) -> nn.ModuleList:
    return nn.ModuleList(_Block(inputs if index == 0 else outputs, outputs) for index in range(blocks))


def _middle(width: int) -> nn.Sequential:
    return nn.Sequential(_Block(width, width), _Attention(width), _Block(width, width))


def _run_clipped(stage: nn.Module, x: torch.Tensor) -> torch.Tensor:
    for block in stage.children():
        x = block(x).clamp(-_CLIP, _CLIP)
    return x


def _unit_magnitude(x: torch.Tensor, dim: int) -> torch.Tensor:
    """Divide by the root mean square along ``dim``, computed in float32."""
    rms = torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=torch.float32) / math.sqrt(x.shape[dim])
    return x / (rms + _EPSILON).to(x.dtype)


def _silu(x: torch.Tensor) -> torch.Tensor:
    return F.silu(x) * _SILU_GAIN


def _blend(x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """Return the weighted sum of ``x`` and the residual ``h``, rescaled to unit magnitude if both are uncorrelated."""
    return torch.lerp(x, h, _SHARE) * (1.0 / math.hypot(1.0 - _SHARE, _SHARE))
