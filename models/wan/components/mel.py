"""Log-mel spectrograms for MMAudio's 16 kHz autoencoder.

Shapes: B waveforms, S samples at 16 kHz, M mel frames (62.5 Hz), 80 mel bands from 0 to 8000 Hz.
The constants are those of MMAudio's 16 kHz converter (a BigVGAN front end): window and FFT of 1024 samples, a hop of
256 samples, magnitude (not power), and the base-10 logarithm of values clamped to at least 1e-5. The bands are
Slaney's: linear below 1 kHz, logarithmic above, each triangle of unit area.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from port_kit.errors import InputError

SAMPLE_RATE = 16_000
FFT_SIZE = 1024
HOP = 256
TOP_HZ = SAMPLE_RATE / 2

_FLOOR = 1e-5
_MAGNITUDE_EPSILON = 1e-9
# Slaney's mel scale: 15 mels at 1 kHz; above 1 kHz, 27 mels per factor of 6.4.
_LINEAR_HZ_PER_MEL = 200.0 / 3.0
_BREAK_HZ = 1000.0
_BREAK_MEL = _BREAK_HZ / _LINEAR_HZ_PER_MEL
_LOG_STEP = math.log(6.4) / 27.0


class LogMel(nn.Module):
    """Waveform to log-mel spectrogram, computed in float32.

    The window and the bands are not in the checkpoint. They have the default dtype at construction: the original
    casts them with its model, so a bfloat16 model uses bands rounded to bfloat16.

    Args:
        bands: number of mel bands.
    """

    window: torch.Tensor
    bands: torch.Tensor

    def __init__(self, bands: int = 80) -> None:
        super().__init__()
        dtype = torch.get_default_dtype()
        self.register_buffer("window", torch.hann_window(FFT_SIZE, dtype=torch.float32).to(dtype), persistent=False)
        self.register_buffer("bands", mel_bands(bands).to(dtype), persistent=False)

    def forward(self, wave: torch.Tensor) -> torch.Tensor:
        """Compute the spectrogram.

        Args:
            wave: ``[B, S]``, clipped to [-1, 1]; S is more than 384.

        Returns:
            float32 ``[B, bands, S // 256]``.

        Raises:
            InputError: the number of dimensions is wrong, or there are too few samples to reflect at the ends.
        """
        margin = (FFT_SIZE - HOP) // 2
        if wave.ndim != 2 or wave.shape[1] <= margin:
            raise InputError(
                f"the waveform has shape {tuple(wave.shape)}; expected [B, S] with S > {margin} samples",
                code="component_input",
                hint=f"give at least {margin + 1} samples ({(margin + 1) / SAMPLE_RATE:.3f} s at 16 kHz)",
            )
        padded = F.pad(wave.float().clamp(-1.0, 1.0).unsqueeze(1), (margin, margin), mode="reflect").squeeze(1)
        spectrum = torch.stft(
            padded, FFT_SIZE, hop_length=HOP, window=self.window.float(), center=False, return_complex=True
        )
        magnitude = torch.sqrt(torch.view_as_real(spectrum).square().sum(-1) + _MAGNITUDE_EPSILON)
        energy = torch.matmul(self.bands, magnitude.to(self.bands.dtype)).float()
        return energy.clamp(min=_FLOOR).log10()


def mel_bands(bands: int) -> torch.Tensor:
    """Return the filters ``[bands, 513]`` (float32) that sum FFT magnitudes into mel bands."""
    top = _BREAK_MEL + math.log(TOP_HZ / _BREAK_HZ) / _LOG_STEP
    corners = _mel_to_hz(torch.linspace(0.0, top, bands + 2, dtype=torch.float64))
    bins = torch.linspace(0.0, TOP_HZ, FFT_SIZE // 2 + 1, dtype=torch.float64)
    widths = corners.diff()
    distance = bins[None, :] - corners[:, None]
    rising = distance[:-2] / widths[:-1, None]
    falling = -distance[2:] / widths[1:, None]
    triangles = torch.minimum(rising, falling).clamp(min=0.0).to(torch.float32)
    # Rounded before and after the scaling, as librosa does.
    area = 2.0 / (corners[2:] - corners[:-2])
    return (triangles.double() * area[:, None]).to(torch.float32)


def _mel_to_hz(mels: torch.Tensor) -> torch.Tensor:
    above = _BREAK_HZ * torch.exp(_LOG_STEP * (mels - _BREAK_MEL))
    return torch.where(mels < _BREAK_MEL, mels * _LINEAR_HZ_PER_MEL, above)
