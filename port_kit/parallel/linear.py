"""vLLM's parallel linears with what a port always wants of them.

Each function builds one linear that returns its output alone (not an output and a bias), takes part in quantization
under its ``prefix``, and keeps its weight where hooks can see it: on a CPU vLLM would otherwise pack the weight into
a private buffer after loading and leave an empty parameter behind, so that HSDP would shard nothing and offload would
move nothing. All widths are the full ones; the linears divide them by the tensor-parallel size.
"""

from __future__ import annotations

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

if TYPE_CHECKING:
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

Layer = TypeVar("Layer", bound=LinearBase)


def qkv(
    dim: int, head_dim: int, heads: int, quant: QuantizationConfig | None, prefix: str, *, bias: bool = True
) -> QKVParallelLinear:
    """Query, key and value of one attention in one matrix, split by heads."""
    return _plain(
        QKVParallelLinear(dim, head_dim, heads, bias=bias, quant_config=quant, prefix=prefix, return_bias=False)
    )


def merged(
    dim: int, outputs: list[int], quant: QuantizationConfig | None, prefix: str, *, bias: bool = True
) -> MergedColumnParallelLinear:
    """Several projections of the same input in one matrix; each is split by output."""
    return _plain(
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
    """Split by output; with ``gather`` every rank gets the whole output."""
    return _plain(
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
    """Split by input, which is already split; the outputs are summed over the ranks."""
    return _plain(
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


def row_parallel_partials(layer: RowParallelLinear, x: Tensor) -> tuple[Tensor, ...]:
    """Return the output of a linear that :func:`row` made, or the two parts of which it is the sum.

    Two ranks of one host send each other their parts through mailboxes (:mod:`~port_kit.parallel.comm.symm_mem`); what
    reads the output can add them in the same pass. It must do so before anything else is exchanged. All else, such as a
    linear with a LoRA around it, or more ranks, is summed as vLLM does.

    Args:
        layer: split by input.
        x: ``[..., K]``, this rank's part of the input.
    """
    plain = type(layer) is RowParallelLinear and layer.tp_size == 2
    peers = get_peer_buffers(get_tp_group().device_group, x) if plain else None
    if peers is None:
        return (layer(x),)
    bias = layer.bias if layer.tp_rank == 0 else None
    return peers.exchange_partial_sums(layer.quant_method.apply(layer, x, bias))


def sum_over_ranks(x: Tensor) -> Tensor:
    """Return the sum of ``x`` over the tensor-parallel ranks; small tensors, of which latency is the cost."""
    group = get_tp_group()
    peers = get_peer_buffers(group.device_group, x) if group.world_size == 2 else None
    if peers is None:
        return tensor_model_parallel_all_reduce(x)
    own, other = peers.exchange_partial_sums(x)
    return own + other


def replicated(dim: int, output: int, quant: QuantizationConfig | None, prefix: str) -> ReplicatedLinear:
    """Whole on every rank: for matrices too small to be worth a collective."""
    return _plain(ReplicatedLinear(dim, output, quant_config=quant, prefix=prefix, return_bias=False))


def tp_rank_and_size() -> tuple[int, int]:
    """Return (this rank's place, ranks) of the group that shares each matrix; (0, 1) outside of an engine."""
    from vllm.distributed import parallel_state

    if not parallel_state.model_parallel_is_initialized():
        return 0, 1
    group = parallel_state.get_tp_group()
    return group.rank_in_group, group.world_size


def _plain(layer: Layer) -> Layer:
    """Keep an unquantized weight a parameter on a CPU; the layer then also runs without a loader's last step.

    A layer that is quantized while it loads is quantized when all its elements have come. vLLM begins to count when it
    makes the weight, before the bias: a bias that comes first would be missed, and every layer with one would wait,
    unquantized, for the end of loading. So the counting begins again here, with the bias.
    """
    if getattr(layer.quant_method, "uses_meta_device", False):
        initialize_online_processing(layer)
    if current_platform.is_cpu() and isinstance(layer.quant_method, UnquantizedLinearMethod):
        layer.skip_weight_relayout = True
        layer.cpu_linear = torch.nn.functional.linear
    return layer
