"""Tokens in eight-bit floats, each with a scale of its own: the input of :mod:`~port_kit.parallel.fp8_linear`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

#: Largest value of float8_e4m3fn.
FP8_MAX = torch.finfo(torch.float8_e4m3fn).max
#: Largest magnitude that is assumed for values that are all zero.
SMALLEST = 1e-12


class QuantizedRows(NamedTuple):
    """Tokens in eight bits.

    Attributes:
        values: float8_e4m3fn ``[..., K]``, contiguous.
        scales: float32 ``[..., 1]``, factors of the values.
    """

    values: Tensor
    scales: Tensor

    @property
    def shape(self) -> torch.Size:
        """Shape of the tokens."""
        return self.values.shape


#: Input of a linear.
Rows = Tensor | QuantizedRows


def quantize_rows(x: Tensor, addend: Tensor | None = None, *, gelu: bool = False) -> QuantizedRows:
    """Quantize tokens.

    Args:
        x: ``[..., K]``.
        addend: the same shape; added first.
        gelu: apply the tanh-approximated GELU first.
    """
    if not x.is_cuda:
        return quantize_rows_torch(x, addend, gelu=gelu)
    from port_kit.parallel import fp8_kernels

    rows = None if addend is None else addend.contiguous().flatten(0, -2)
    values, scales = fp8_kernels.quantize_rows(x.contiguous().flatten(0, -2), rows, gelu=gelu)
    return QuantizedRows(values.view(x.shape), scales.view(*x.shape[:-1], 1))


def quantize_rows_torch(x: Tensor, addend: Tensor | None = None, *, gelu: bool = False) -> QuantizedRows:
    """Return the result of :func:`quantize_rows` in plain PyTorch."""
    wide = x.float() if addend is None else x.float() + addend.float()
    if gelu:
        wide = F.gelu(wide, approximate="tanh")
    scales = wide.abs().amax(-1, keepdim=True).clamp(min=SMALLEST) / FP8_MAX
    return QuantizedRows((wide / scales).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), scales)


def takes_rows(layer: nn.Module) -> bool:
    """Return True if a linear accepts :class:`QuantizedRows`; False for one of another method or with a LoRA."""
    return getattr(getattr(layer, "quant_method", None), "takes_rows", False)
