"""Decoder of MOVA's audio VAE, a DAC with continuous latents: latents at 50 Hz to a waveform at 48 kHz.

Shapes: B clips, C latent channels, L latents, W channels of a layer, S samples at a layer's rate.

Weights are rounded to the dtype of the engine when they are loaded; the decoder computes in float32, as the original
does. The encoder is not part of the pipeline and is not built.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from port_kit.errors import ConfigError, InputError
from port_kit.escape import quoted
from port_kit.pipeline.precision import default_dtype

#: Dilations of the residual units after each upsampling.
DILATIONS = (1, 3, 9)
_TAPS = 7
_DIVISION_GUARD = 1e-9


@dataclass(frozen=True)
class AudioVAEConfig:
    """Sizes of the decoder, under the names of the original's JSON.

    Attributes:
        latent_dim: channels C of the latents.
        decoder_dim: channels after the first convolution; each upsampling halves them.
        decoder_rates: factors by which the rate grows.
        sample_rate: of the waveform, in Hz.
    """

    latent_dim: int
    decoder_dim: int
    decoder_rates: tuple[int, ...]
    sample_rate: int

    def __post_init__(self) -> None:
        if self.decoder_dim % 2 ** len(self.decoder_rates):
            raise ConfigError(f"decoder_dim {self.decoder_dim} cannot be halved {len(self.decoder_rates)} times")

    @property
    def hop(self) -> int:
        """Samples per latent."""
        return math.prod(self.decoder_rates)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> AudioVAEConfig:
        """Read the original's JSON.

        Raises:
            ConfigError: a field is missing, or the latents are quantized.
        """
        if values.get("continuous") is not True:
            raise ConfigError(
                f"continuous of the audio VAE is {quoted(values.get('continuous'))}; only True is supported"
            )
        names = ("latent_dim", "decoder_dim", "decoder_rates", "sample_rate")
        if missing := [name for name in names if name not in values]:
            raise ConfigError(f"the audio VAE's config has no {quoted(missing[0])}")
        return cls(**{name: values[name] for name in names} | {"decoder_rates": tuple(values["decoder_rates"])})


class Snake(nn.Module):
    """Periodic activation ``x + sin(alpha x)^2 / alpha`` with a frequency per channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.empty(1, channels, 1))

    def forward(self, x_BWS: Tensor) -> Tensor:
        """Return ``[B, W, S]``."""
        return x_BWS + torch.sin(self.alpha * x_BWS).square() / (self.alpha + _DIVISION_GUARD)


class ResidualUnit(nn.Module):
    """A dilated and a pointwise convolution around the identity."""

    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        padding = dilation * (_TAPS // 2)
        self.activations = nn.ModuleList([Snake(channels), Snake(channels)])
        self.dilated = nn.Conv1d(channels, channels, _TAPS, dilation=dilation, padding=padding)
        self.pointwise = nn.Conv1d(channels, channels, 1)

    def forward(self, x_BWS: Tensor) -> Tensor:
        """Return ``[B, W, S]``."""
        first, second = self.activations
        return x_BWS + self.pointwise(second(self.dilated(first(x_BWS))))


class Stage(nn.Module):
    """Upsampling by a factor, then residual units."""

    def __init__(self, channels: int, rate: int) -> None:
        super().__init__()
        half = channels // 2
        self.activation = Snake(channels)
        self.upsample = nn.ConvTranspose1d(
            channels, half, 2 * rate, stride=rate, padding=math.ceil(rate / 2), output_padding=rate % 2
        )
        self.units = nn.Sequential(*(ResidualUnit(half, dilation) for dilation in DILATIONS))

    def forward(self, x_BWS: Tensor) -> Tensor:
        """Return ``[B, W / 2, rate * S]``."""
        return self.units(self.upsample(self.activation(x_BWS)))


class AudioVAE(nn.Module):
    """The decoder.

    Args:
        config: sizes.
        precision: dtype to which weights are rounded.
    """

    def __init__(self, config: AudioVAEConfig, precision: torch.dtype) -> None:
        super().__init__()
        self.config = config
        self.precision = precision
        widths = [config.decoder_dim >> stage for stage in range(len(config.decoder_rates) + 1)]
        with default_dtype(torch.float32):
            self.post_quant = nn.Conv1d(config.latent_dim, config.latent_dim, 1)
            self.input = nn.Conv1d(config.latent_dim, widths[0], _TAPS, padding=_TAPS // 2)
            stages = zip(widths, config.decoder_rates, strict=False)
            self.stages = nn.Sequential(*(Stage(width, rate) for width, rate in stages))
            self.activation = Snake(widths[-1])
            self.output = nn.Conv1d(widths[-1], 1, _TAPS, padding=_TAPS // 2)
        self.eval().requires_grad_(False)
        for parameter in self.parameters():
            parameter.weight_loader = self._load_rounded  # type: ignore[attr-defined]

    @torch.no_grad()
    def decode(self, latents_BCL: Tensor) -> Tensor:
        """Decode latents of any dtype to samples in [-1, 1], float32 ``[B, L * hop]``.

        Raises:
            InputError: the latents have another shape.
        """
        if latents_BCL.ndim != 3 or latents_BCL.shape[1] != self.config.latent_dim or not latents_BCL.shape[2]:
            raise InputError(
                f"audio latents have shape {tuple(latents_BCL.shape)}; expected [B, {self.config.latent_dim}, L]",
                code="component_input",
            )
        x = self.stages(self.input(self.post_quant(latents_BCL.float())))
        return self.output(self.activation(x)).tanh().squeeze(1)

    def _load_rounded(self, parameter: Tensor, weight: Tensor) -> None:
        parameter.data.copy_(weight.to(self.precision))


def build_audio_vae(config: Mapping[str, Any], *, precision: torch.dtype | None = None) -> AudioVAE:
    """Build the decoder with uninitialized weights on the current default device.

    Args:
        config: content of ``audio_vae/config.json``.
        precision: see :class:`AudioVAE`; None for the current default dtype.
    """
    return AudioVAE(AudioVAEConfig.from_dict(config), precision or torch.get_default_dtype())
