"""Linears in eight-bit floats: a scale for each token and for each output, weights quantized while they are loaded.

vLLM's ``quantization="fp8"`` selects them (:func:`with_row_scales`). In contrast to vLLM's own method, weights have a
scale per output instead of one for all, and a linear accepts tokens that the operation before it has quantized
(:class:`~port_kit.parallel.fp8_rows.QuantizedRows`), so that they are read and written once.

Tensor parallelism divides a token or a weight's row among ranks. Each part has its own scale, which is at most that of
the complete row.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.quantization.online.fp8 import OnlineLinearBase
from vllm.model_executor.utils import replace_parameter
from vllm.platforms import current_platform
from vllm_omni.quantization.component_config import ComponentQuantizationConfig

from port_kit.parallel.fp8_rows import QuantizedRows, Rows, quantize_rows
from port_kit.upstream.checks import require

require("fp8_linears")

#: Compute capability from which PyTorch multiplies matrices with a scale per row.
CAPABILITY = 90


def with_row_scales(quant: QuantizationConfig | None) -> QuantizationConfig | None:
    """Return a quantization with vLLM's dynamic FP8 replaced by this module's, on devices that have it."""
    if isinstance(quant, ComponentQuantizationConfig):
        parts = {prefix: with_row_scales(part) for prefix, part in quant._components.items()}
        return ComponentQuantizationConfig(parts, with_row_scales(quant._default))
    if quant is None or not _is_dynamic_fp8(quant) or not _has_row_scales():
        return quant
    replaced = _row_scaled(type(quant))
    replaced.__dict__.update(quant.__dict__)
    return replaced


def _is_dynamic_fp8(quant: Any) -> bool:
    """Return True for FP8 with one scale per weight, made while loading: vLLM's class, or one of vLLM-Omni 0.32."""
    if quant.get_name() != "fp8" or isinstance(quant, RowScaledConfig):
        return False
    return not quant.is_checkpoint_fp8_serialized and quant.weight_block_size is None


def _has_row_scales() -> bool:
    """Return True on a CPU, and on a GPU whose kernels have a scale per row; their result is bfloat16."""
    if current_platform.is_cpu():
        return True
    return torch.get_default_dtype() == torch.bfloat16 and current_platform.has_device_capability(CAPABILITY)


class RowScaledConfig(QuantizationConfig):
    """Dynamic FP8 for the linears that another configuration, the second base of a subclass, would quantize."""

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """Return the method of a linear, and None for other layers."""
        if not isinstance(layer, LinearBase):
            return None
        method = super().get_quant_method(layer, prefix)  # type: ignore[safe-super]
        return method if isinstance(method, UnquantizedLinearMethod) else RowScaledLinearMethod()


def _row_scaled(base: type[QuantizationConfig]) -> RowScaledConfig:
    """Return an empty configuration on top of a class of configurations."""
    kind: Any = type("RowScaledConfig", (RowScaledConfig, base), {})
    empty: RowScaledConfig = kind.__new__(kind)
    return empty


class RowScaledLinearMethod(OnlineLinearBase):
    """A linear with eight-bit weights ``[N, K]`` and their scales ``[N, 1]``."""

    takes_rows: ClassVar[bool] = True
    requantization_source: Any = None  # vLLM 0.32's attribute: no conversion from another quantization

    def __init__(self) -> None:
        """Leave out the base's, which reads the configuration of a language model."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Replace the weight by its eight-bit form and its scales."""
        weight: Any = layer.weight
        if weight.dtype == torch.float8_e4m3fn:
            return
        rows = quantize_rows(weight)
        replace_parameter(layer, "weight", rows.values)
        replace_parameter(layer, "weight_scale", rows.scales)

    def apply(self, layer: nn.Module, x: Rows, bias: Tensor | None = None) -> Tensor:
        """Return ``[..., N]`` in the dtype that the weights had."""
        layer_: Any = layer
        rows = x if isinstance(x, QuantizedRows) else quantize_rows(x)
        return multiply(rows, QuantizedRows(layer_.weight, layer_.weight_scale), bias, layer_.orig_dtype)


def multiply(x: QuantizedRows, weight: QuantizedRows, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return the product of tokens ``[..., K]`` and a weight ``[N, K]``, plus the bias ``[N]``, as ``[..., N]``.

    On a CPU the product is computed from the dequantized values, in float32.
    """
    shape = (*x.shape[:-1], weight.shape[0])
    if not x.values.is_cuda:
        product = F.linear(x.values.float() * x.scales, weight.values.float() * weight.scales)
        return (product if bias is None else product + bias.float()).to(dtype)
    if not x.values.numel():
        return x.scales.new_empty(shape, dtype=dtype)
    product = torch._scaled_mm(
        x.values.flatten(0, -2),
        weight.values.t(),
        scale_a=x.scales.flatten(0, -2),
        scale_b=weight.scales.t(),
        bias=bias,
        out_dtype=dtype,
        use_fast_accum=True,
    )
    return product.view(shape)
