"""Outputs of modules during a forward pass, for comparison with those of the original implementation. ::

with outputs_of(transformer, ["blocks.0.out", "blocks.0"]) as found:
    transformer(**inputs)
yield Pair("attention of block 0", found["blocks.0.out"], recorded["layers.0.attn"], BOUND)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from port_kit.errors import ParityError

if TYPE_CHECKING:
    from torch import Tensor, nn


@contextmanager
def outputs_of(module: nn.Module, names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """Collect the outputs of submodules, in the order of the calls.

    A module that is called again adds ``NAME#2``, ``NAME#3`` and so on. Of a tuple, the first tensor is taken, as the
    bias that a linear leaves to its caller comes second.

    Args:
        module: the module that is called within the context.
        names: names of its submodules.

    Raises:
        ParityError: ``parity_module``; a name is no submodule, or a submodule was not called.
    """
    wanted, modules = list(dict.fromkeys(names)), dict(module.named_modules())
    unknown = [name for name in wanted if name not in modules]
    if unknown:
        raise ParityError(
            f"{type(module).__name__} has no module {', '.join(unknown)}",
            code="parity_module",
            hint="names are those of named_modules()",
        )
    found: dict[str, Tensor] = {}
    handles = [modules[name].register_forward_hook(_keep(found, name)) for name in wanted]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
    silent = [name for name in wanted if name not in found]
    if silent:
        raise ParityError(
            f"{type(module).__name__} did not call {', '.join(silent)}",
            code="parity_module",
            hint="compare modules that the forward pass calls; hooks see no direct calls of forward()",
        )


def _keep(found: dict[str, Tensor], name: str) -> Any:
    calls = 0

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
        nonlocal calls
        calls += 1
        value = output[0] if isinstance(output, tuple) else output
        found[name if calls == 1 else f"{name}#{calls}"] = value.detach().clone()

    return hook
