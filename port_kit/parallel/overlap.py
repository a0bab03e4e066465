"""A row-parallel linear whose sum over the ranks is on its way while the rest of its product is computed.

vLLM's ``RowParallelLinear`` multiplies all tokens, then sums them over the ranks, and the device waits. :func:`row`
cuts the tokens into parts and sends each as soon as it is there: what remains visible is the last part's sum.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from vllm.model_executor.layers.linear import RowParallelLinear

#: Two parts hide half of the sum; more make products too small to fill a GPU.
PARTS = 2
#: Tokens of a batch below which one sum is faster than several.
MIN_TOKENS = 4096


def row(layer: RowParallelLinear, x: Tensor) -> Tensor:
    """Return what ``layer(x)`` does.

    Layers that are more than a matrix and a bias (quantized, adapted by a LoRA) and short inputs take vLLM's way.

    Args:
        layer: with ``input_is_parallel`` and ``reduce_results``, as :func:`port_kit.parallel.linear.row` builds it.
        x: ``[..., inputs of this rank]``.
    """
    from vllm.distributed import get_tp_group

    rows = x.flatten(0, -2)
    if layer_is_shared(layer) and rows.shape[0] >= MIN_TOKENS:
        out = rows.new_empty(rows.shape[0], layer.weight.shape[0])
        weight, group = layer.weight.t(), get_tp_group().device_group
        bias = layer.bias if layer.tp_rank == 0 else None
        sums = []
        for given, part in zip(rows.chunk(PARTS), out.chunk(PARTS), strict=True):
            if bias is None:
                torch.mm(given, weight, out=part)
            else:
                torch.addmm(bias, given, weight, out=part)
            sums.append(torch.distributed.all_reduce(part, group=group, async_op=True))
        for handle in sums:
            handle.wait()
        return out.unflatten(0, x.shape[:-1])
    return layer(x)


def layer_is_shared(layer: RowParallelLinear) -> bool:
    """Whether several ranks share the layer, and it is a plain matrix with or without a bias."""
    from vllm.model_executor.layers.linear import RowParallelLinear, UnquantizedLinearMethod

    if type(layer) is not RowParallelLinear or type(layer.quant_method) is not UnquantizedLinearMethod:
        return False
    return layer.tp_size > 1 and layer.reduce_results and layer.input_is_parallel and not layer.skip_bias_add
