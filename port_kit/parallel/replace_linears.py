"""Replacement of ``nn.Linear`` modules by vLLM's parallel linears, according to a table.

The table maps path patterns to roles; ``*`` matches one path component::

    LINEARS = {"blocks.*.ff.net.0.proj": "column", "blocks.*.ff.net.2": "row", "time_embed.linear": "gathered"}

Linears without an entry stay replicated.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Literal

from torch import nn

from port_kit.errors import ParallelError
from port_kit.escape import quoted
from port_kit.parallel import linear

if TYPE_CHECKING:
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

#: column: split by output; row: split by input, after a column linear; gathered: split by output, then all-gathered.
Role = Literal["column", "row", "gathered"]


def replace_linears(
    module: nn.Module, table: Mapping[str, Role], quant: QuantizationConfig | None, prefix: str
) -> None:
    """Replace the linears in a table; names, full shapes and biases stay.

    Args:
        module: module without loaded weights; the new linears are uninitialized.
        table: role by path or path pattern.
        quant: quantization of the new linears, or None.
        prefix: path of ``module`` in the pipeline.

    Raises:
        ParallelError: ``parallel_table``; an entry matches no module, or one that is not an ``nn.Linear``.
    """
    paths = [path for path, _ in module.named_modules()]
    for pattern, role in table.items():
        found = [path for path in paths if matches(path, pattern)]
        plain = {path: module.get_submodule(path) for path in found}
        if not plain or not all(isinstance(child, nn.Linear) for child in plain.values()):
            kinds = sorted({type(child).__name__ for child in plain.values()}) or ["no module"]
            raise ParallelError(
                f"Table entry {quoted(pattern)}: expected nn.Linear, got {' and '.join(kinds)}.",
                code="parallel_table",
                hint="correct the path; print(module) shows the module tree",
                entry=pattern,
                found=kinds,
            )
        for path, child in plain.items():
            _put(module, path, _parallel(child, role, quant, f"{prefix}.{path}"))


def matches(path: str, pattern: str) -> bool:
    """Return True if a path matches a pattern, component by component: ``*`` matches no dot."""
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
