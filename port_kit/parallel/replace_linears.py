"""Exchange the plain linears of a module that somebody else wrote for parallel ones, by an explicit table.

A table says for each ``nn.Linear`` that is worth a collective how it is split; ``*`` stands for one part of a path::

    LINEARS = {"blocks.*.ff.net.0.proj": "column", "blocks.*.ff.net.2": "row", "time_embed.linear": "gathered"}

Every linear that no entry names stays whole on every rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Literal

from torch import nn

from port_kit.errors import ParallelError
from port_kit.parallel import linear

if TYPE_CHECKING:
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

#: column: split by output; row: split by input, which a column linear before it has split; gathered: split by output,
#: and every rank gets all of it.
Role = Literal["column", "row", "gathered"]


def replace_linears(
    module: nn.Module, table: Mapping[str, Role], quant: QuantizationConfig | None, prefix: str
) -> None:
    """Replace the linears that a table names; names, shapes and biases stay.

    Args:
        module: built empty; the parallel linears have no values either.
        table: path of a linear, or a pattern of paths, to its role.
        quant: quantization of the new linears, None for none.
        prefix: path of ``module`` in the pipeline.

    Raises:
        ParallelError: an entry names no linear, or something else.
    """
    paths = [path for path, _ in module.named_modules()]
    for pattern, role in table.items():
        found = [path for path in paths if matches(path, pattern)]
        plain = {path: module.get_submodule(path) for path in found}
        if not plain or not all(isinstance(child, nn.Linear) for child in plain.values()):
            kinds = sorted({type(child).__name__ for child in plain.values()}) or ["nothing"]
            raise ParallelError(
                f"{pattern!r} names {' and '.join(kinds)}; a table of linears names nn.Linear",
                code="parallel_table",
                hint="correct the path: print the module to see its tree",
            )
        for path, child in plain.items():
            _put(module, path, _parallel(child, role, quant, f"{prefix}.{path}"))


def matches(path: str, pattern: str) -> bool:
    """Whether a module's path is what a pattern means: part by part, so that ``*`` crosses no dot."""
    parts, wanted = path.split("."), pattern.split(".")
    return len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))


def _parallel(plain: nn.Module, role: Role, quant: QuantizationConfig | None, prefix: str) -> LinearBase:
    assert isinstance(plain, nn.Linear)
    sizes, bias = (plain.in_features, plain.out_features), plain.bias is not None
    if role == "row":
        return linear.row(*sizes, quant, prefix, bias=bias)
    return linear.column(*sizes, quant, prefix, gather=role == "gathered", bias=bias)


def _put(module: nn.Module, path: str, child: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(module.get_submodule(parent), name, child)
