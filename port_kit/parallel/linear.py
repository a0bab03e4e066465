"""Constructors for vLLM's parallel linears with this kit's defaults.

Each linear returns its output without the bias, accepts quantization under its ``prefix``, and keeps its weight a
parameter on a CPU. vLLM's CPU build otherwise packs the weight into a private buffer after loading, which neither HSDP
nor offload finds. All widths are full widths; the linears divide them by the tensor-parallel size.
"""

from __future__ import annotations

from types import MethodType
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor
from vllm.distributed import get_tp_group, tensor_model_parallel_all_reduce
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.model_loader.reload.layerwise import initialize_online_processing
from vllm.platforms import current_platform

from port_kit.parallel.comm.symm_mem import get_peer_buffers
from port_kit.parallel.fp8_rows import QuantizedRows, Rows
from port_kit.upstream.checks import require
from port_kit.upstream.linear import keep_plain_weight

if TYPE_CHECKING:
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

require("linears")
require("online_quantization")

Layer = TypeVar("Layer", bound=LinearBase)


def qkv(
    dim: int, head_dim: int, heads: int, quant: QuantizationConfig | None, prefix: str, *, bias: bool = True
) -> QKVParallelLinear:
    """Build a fused query, key and value projection, split by heads."""
    return _with_defaults(
        QKVParallelLinear(dim, head_dim, heads, bias=bias, quant_config=quant, prefix=prefix, return_bias=False)
    )


def merged(
    dim: int, outputs: list[int], quant: QuantizationConfig | None, prefix: str, *, bias: bool = True
) -> MergedColumnParallelLinear:
    """Build fused projections of the same input, each split by output."""
    return _with_defaults(
        MergedColumnParallelLinear(dim, outputs, bias=bias, quant_config=quant, prefix=prefix, return_bias=False)
    )


def column(
    dim: int,
    output: int,
    quant: QuantizationConfig | None,
    prefix: str,
    *,
    gather: bool = False,
    bias: bool = True,
) -> ColumnParallelLinear:
    """Build a linear split by output. With ``gather``, all-gather the output."""
    return _with_defaults(
        ColumnParallelLinear(
            dim,
            output,
            bias=bias,
            gather_output=gather,
            quant_config=quant,
            prefix=prefix,
            return_bias=False,
        )
    )


def row(
    dim: int, output: int, quant: QuantizationConfig | None, prefix: str, *, bias: bool = True
) -> RowParallelLinear:
    """Build a linear split by input. Its input is already split; its output is all-reduced."""
    return _with_defaults(
        RowParallelLinear(
            dim,
            output,
            bias=bias,
            input_is_parallel=True,
            quant_config=quant,
            prefix=prefix,
            return_bias=False,
        )
    )


def row_parallel_partials(layer: RowParallelLinear, x: Rows) -> tuple[Tensor, ...]:
    """Return the output of a :func:`row` linear, or two partial sums that add up to it.

    On two ranks of one host, partial sums are exchanged through symmetric memory
    (:mod:`~port_kit.parallel.comm.symm_mem`), and the consumer adds them, fused with its own work. It must read them
    before the next exchange. In all other cases, such as a linear with LoRA or more ranks, the output is all-reduced.

    Args:
        layer: linear that is split by input.
        x: ``[..., K]``, this rank's part of the input; quantized only for a linear that takes that.
    """
    plain = type(layer) is RowParallelLinear and layer.tp_size == 2
    values = x.values if isinstance(x, QuantizedRows) else x
    peers = get_peer_buffers(get_tp_group().device_group, values) if plain else None
    if peers is None:
        return (layer(x),)
    bias = layer.bias if layer.tp_rank == 0 else None
    return peers.exchange_partial_sums(layer.quant_method.apply(layer, x, bias))


def use_peer_memory(layer: RowParallelLinear | ColumnParallelLinear) -> None:
    """Let a linear exchange its output through symmetric memory, if the ranks have it.

    It replaces the all-reduce of a linear that is split by input, on two ranks, and the all-gather of one that gathers
    its output. The layer's class stays, by which vLLM recognizes layers that a LoRA can adapt.
    """
    forward = _sum_partials if isinstance(layer, RowParallelLinear) else _gather_output
    layer.forward = MethodType(forward, layer)  # type: ignore[method-assign]


@torch.compiler.disable
def _sum_partials(layer: RowParallelLinear, x: Tensor) -> Tensor:
    peers = get_peer_buffers(get_tp_group().device_group, x) if layer.tp_size == 2 else None
    if peers is None:
        return type(layer).forward(layer, x)
    own, other = peers.exchange_partial_sums(
        layer.quant_method.apply(layer, x, layer.bias if layer.tp_rank == 0 else None)
    )
    return own + other


@torch.compiler.disable
def _gather_output(layer: ColumnParallelLinear, x: Tensor) -> Tensor:
    peers = get_peer_buffers(get_tp_group().device_group, x) if layer.tp_size > 1 else None
    if peers is None:
        return type(layer).forward(layer, x)
    own = layer.quant_method.apply(layer, x, layer.bias)
    return peers.gather(own, own.dim() - 1).clone()


@torch.compiler.disable
def sum_over_ranks(x: Tensor) -> Tensor:
    """All-reduce a small tensor over the tensor-parallel ranks with low latency."""
    group = get_tp_group()
    peers = get_peer_buffers(group.device_group, x) if group.world_size == 2 else None
    if peers is None:
        return tensor_model_parallel_all_reduce(x)
    own, other = peers.exchange_partial_sums(x)
    return own + other


def replicated(dim: int, output: int, quant: QuantizationConfig | None, prefix: str) -> ReplicatedLinear:
    """Build a replicated linear, for matrices too small to split."""
    return _with_defaults(ReplicatedLinear(dim, output, quant_config=quant, prefix=prefix, return_bias=False))


def in_float32(layer: LinearBase, x: Tensor) -> Tensor:
    """Return the output of a linear, computed in float32 from the values of its weights.

    Args:
        layer: not quantized; one with a LoRA computes in the dtype of its weights.
        x: ``[..., K]``, of any dtype.
    """
    dtype = next(layer.parameters()).dtype
    if dtype == torch.float32 or type(layer) not in (ColumnParallelLinear, RowParallelLinear, ReplicatedLinear):
        return layer(x.to(dtype)).float()
    exact = {name: parameter.float() for name, parameter in layer.named_parameters()}
    output: Tensor = torch.func.functional_call(layer, exact, (x.float(),))
    return output


def tp_rank_and_size() -> tuple[int, int]:
    """Return rank and size of the tensor-parallel group; (0, 1) outside of an engine."""
    from vllm.distributed import parallel_state

    if not parallel_state.model_parallel_is_initialized():
        return 0, 1
    group = parallel_state.get_tp_group()
    return group.rank_in_group, group.world_size


def _with_defaults(layer: Layer) -> Layer:
    """Apply this kit's defaults to a linear.

    On a CPU, an unquantized weight stays a parameter, so that the layer also runs without vLLM's post-load step.

    With online quantization, vLLM quantizes a layer as soon as all its elements are loaded. It starts to count when the
    weight is created, before the bias exists, and would miss a bias that is loaded first. The count is restarted here,
    including the bias.
    """
    if getattr(layer.quant_method, "uses_meta_device", False):
        initialize_online_processing(layer)
    if current_platform.is_cpu() and isinstance(layer.quant_method, UnquantizedLinearMethod):
        keep_plain_weight(layer)
    return layer
