"""BigVGAN for 16 kHz: log-mel spectrograms to waveforms.

Shapes: B clips, M mel frames (62.5 Hz), T samples inside the network at a layer's rate, W channels, K taps; the
output has 256 M samples at 16 kHz.

The network alternates learned upsampling with residual blocks whose activation is periodic (snake). To avoid aliasing
of the harmonics that an activation adds, it runs at twice the rate, between a fixed interpolation filter and a fixed
low-pass filter. The filters are in the checkpoint. The rule set
(:data:`port_kit.models.wan.weights.component_rules.VOCODER`) folds weight normalization on loading.

Convolutions compute in the dtype of the weights, the periodic part of the activation in float32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from port_kit.errors import InputError, PortKitError
from port_kit.escape import quoted, reason_of

#: Taps of the fixed filters around an activation, and their oversampling factor.
FILTER_TAPS = 12
OVERSAMPLING = 2

_EDGE_TAPS = 7  # of the first and the last convolution
_DIVISION_GUARD = 1e-9


@dataclass(frozen=True)
class VocoderConfig:
    """Sizes of the generator, under the names of BigVGAN's configuration files.

    Attributes:
        num_mels: mel bands.
        upsample_initial_channel: channels after the first convolution; each upsampling halves them.
        upsample_rates: factors by which the rate grows; their product is the hop of the mel frames in samples.
        upsample_kernel_sizes: taps of each upsampling convolution.
        resblock_kernel_sizes: taps of the residual blocks that follow each upsampling; their outputs are averaged.
        resblock_dilation_sizes: dilations of the pairs of convolutions in each of those blocks.
        snake_logscale: a checkpoint holds the logarithms of the activations' parameters.
        use_tanh_at_final: tanh bounds the waveform; otherwise it is clipped.
        use_bias_at_final: the last convolution has a bias.
    """

    num_mels: int
    upsample_initial_channel: int
    upsample_rates: tuple[int, ...]
    upsample_kernel_sizes: tuple[int, ...]
    resblock_kernel_sizes: tuple[int, ...]
    resblock_dilation_sizes: tuple[tuple[int, ...], ...]
    snake_logscale: bool = True
    use_tanh_at_final: bool = True
    use_bias_at_final: bool = True

    @property
    def hop(self) -> int:
        """Samples per mel frame."""
        return math.prod(self.upsample_rates)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> VocoderConfig:
        """Read ``vocoder/config.json``; other keys than the fields of this class are ignored.

        Raises:
            PortKitError: a key is missing, or the kind of block or activation is not implemented.
        """
        for key, supported in (("resblock", "1"), ("activation", "snakebeta")):
            if str(config.get(key, supported)) != supported:
                raise _bad_config(f"{key} is {quoted(config[key])}; only {quoted(supported)} is implemented")
        names = [name for name in cls.__dataclass_fields__ if name in config]
        try:
            return cls(**{name: _frozen(config[name]) for name in names})
        except TypeError as error:
            raise _bad_config(reason_of(error).partition(") ")[2]) from error


class Vocoder(nn.Module):
    """The generator of BigVGAN."""

    def __init__(self, config: VocoderConfig) -> None:
        super().__init__()
        self.config = config
        widths = [config.upsample_initial_channel >> level for level in range(len(config.upsample_rates) + 1)]
        self.input = nn.Conv1d(config.num_mels, widths[0], _EDGE_TAPS, padding=_EDGE_TAPS // 2)
        self.upsamplers = nn.ModuleList(
            nn.ConvTranspose1d(wide, narrow, taps, rate, padding=(taps - rate) // 2)
            for wide, narrow, taps, rate in zip(
                widths[:-1], widths[1:], config.upsample_kernel_sizes, config.upsample_rates, strict=True
            )
        )
        # one flat list, as in checkpoints, in order of the upsamplings
        self.blocks = nn.ModuleList(
            _Block(width, taps, dilations, config.snake_logscale)
            for width in widths[1:]
            for taps, dilations in zip(config.resblock_kernel_sizes, config.resblock_dilation_sizes, strict=True)
        )
        self.activation = SnakeBeta(widths[-1], config.snake_logscale)
        self.output = nn.Conv1d(widths[-1], 1, _EDGE_TAPS, padding=_EDGE_TAPS // 2, bias=config.use_bias_at_final)

    @torch.no_grad()
    def forward(self, mel: torch.Tensor) -> torch.Tensor:
        """Synthesize waveforms.

        Args:
            mel: base-10 log-mel frames ``[B, num_mels, M]``, any float dtype.

        Returns:
            ``[B, 1, hop * M]`` in [-1, 1], in the dtype of the weights.

        Raises:
            InputError: the number of dimensions or bands is wrong.
        """
        if mel.ndim != 3 or mel.shape[1] != self.config.num_mels:
            raise InputError(
                f"the spectrogram has shape {tuple(mel.shape)}; expected [B, {self.config.num_mels}, M]",
                code="component_input",
            )
        x = self.input(mel.to(self.input.weight.dtype))
        per_level = len(self.config.resblock_kernel_sizes)
        for level, upsample in enumerate(self.upsamplers):
            x = upsample(x)
            x = _mean_of([self.blocks[level * per_level + index] for index in range(per_level)], x)
        x = self.output(self.activation(x))
        return torch.tanh(x) if self.config.use_tanh_at_final else x.clamp(-1.0, 1.0)


def build_vocoder(config: Mapping[str, Any]) -> Vocoder:
    """Build the vocoder with uninitialized weights on the current default device and dtype.

    Args:
        config: content of ``vocoder/config.json``, see :class:`VocoderConfig`.

    Raises:
        PortKitError: the configuration is incomplete, or an option is not implemented.
    """
    return Vocoder(VocoderConfig.from_dict(config))


class SnakeBeta(nn.Module):
    """``x + sin(alpha x)^2 / beta`` at twice the rate, between two fixed filters; ``[B, W, T]`` to the same.

    Args:
        width: channels; alpha and beta are one number per channel.
        log_scale: the parameters are logarithms.
    """

    upsample_filter: torch.Tensor
    downsample_filter: torch.Tensor

    def __init__(self, width: int, log_scale: bool) -> None:
        super().__init__()
        self.log_scale = log_scale
        self.alpha = nn.Parameter(torch.empty(width))
        self.beta = nn.Parameter(torch.empty(width))
        self.register_buffer("upsample_filter", torch.empty(1, 1, FILTER_TAPS))
        self.register_buffer("downsample_filter", torch.empty(1, 1, FILTER_TAPS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._downsample(self._activate(self._upsample(x)))

    def _upsample(self, x: torch.Tensor) -> torch.Tensor:
        """Interpolate ``[B, W, T]`` to ``[B, W, 2 T]``, without the filter's response beyond the edges."""
        width, rate = x.shape[1], OVERSAMPLING
        margin = FILTER_TAPS // rate - 1
        x = F.pad(x, (margin, margin), mode="replicate")
        x = F.conv_transpose1d(x, self.upsample_filter.expand(width, -1, -1), stride=rate, groups=width)
        cut = margin * rate + (FILTER_TAPS - rate) // 2
        return rate * x[..., cut : -(cut + (FILTER_TAPS - rate) % 2)]

    def _activate(self, x: torch.Tensor) -> torch.Tensor:
        alpha, beta = self.alpha.float().unsqueeze(-1), self.beta.float().unsqueeze(-1)
        if self.log_scale:
            alpha, beta = alpha.exp(), beta.exp()
        return (x * alpha).sin_().square_().mul_(1.0 / (beta + _DIVISION_GUARD)).add_(x)

    def _downsample(self, x: torch.Tensor) -> torch.Tensor:
        """Low-pass ``[B, W, 2 T]`` and keep every other sample."""
        width = x.shape[1]
        left = (FILTER_TAPS - 1) // 2
        x = F.pad(x.to(self.downsample_filter.dtype), (left, FILTER_TAPS // 2), mode="replicate")
        return F.conv1d(x, self.downsample_filter.expand(width, -1, -1), stride=OVERSAMPLING, groups=width)


class _Block(nn.Module):
    """Residual block: for each dilation, activation, dilated convolution, activation, plain convolution."""

    def __init__(self, width: int, taps: int, dilations: tuple[int, ...], log_scale: bool) -> None:
        super().__init__()
        self.dilated = nn.ModuleList(
            nn.Conv1d(width, width, taps, dilation=dilation, padding=(taps - 1) * dilation // 2)
            for dilation in dilations
        )
        self.plain = nn.ModuleList(nn.Conv1d(width, width, taps, padding=(taps - 1) // 2) for _ in dilations)
        # two per dilation: before the dilated convolution and before the plain one
        self.activations = nn.ModuleList(SnakeBeta(width, log_scale) for _ in range(2 * len(dilations)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for index, (dilated, plain) in enumerate(zip(self.dilated, self.plain, strict=True)):
            h = dilated(self.activations[2 * index](x))
            x = plain(self.activations[2 * index + 1](h)) + x
        return x


def _mean_of(blocks: list[nn.Module], x: torch.Tensor) -> torch.Tensor:
    total = blocks[0](x)
    for block in blocks[1:]:
        total = total + block(x)
    return total / len(blocks)


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, list | tuple) else value


def _bad_config(problem: str) -> PortKitError:
    return PortKitError(
        f"the vocoder's configuration cannot be used: {problem}",
        code="component_config",
        hint="use the vocoder/config.json that `port-kit download` writes",
    )
