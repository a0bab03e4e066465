"""Parameters of which each tensor-parallel rank holds a part, outside of vLLM's linears."""

from __future__ import annotations

from torch import Tensor, nn


def sharded_parameter(whole: Tensor, dim: int, rank: int, ranks: int) -> nn.Parameter:
    """Return an uninitialized parameter for a rank's part of a dimension; its ``weight_loader`` accepts the whole.

    The whole is loaded in rank order. With one rank the parameter is a plain one.
    """
    shape = list(whole.shape)
    size = shape[dim] // ranks
    shape[dim] = size
    parameter = nn.Parameter(whole.new_empty(shape), requires_grad=False)
    if ranks == 1:
        return parameter
    parameter.full_shape = tuple(whole.shape)  # type: ignore[attr-defined]

    def load(own: nn.Parameter, loaded: Tensor) -> None:
        own.data.copy_(loaded.narrow(dim, rank * size, size))

    parameter.weight_loader = load  # type: ignore[attr-defined]
    return parameter
