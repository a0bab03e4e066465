"""Hand-written modules in place of adapted ones, such as a feed-forward with a fused kernel.

A port names them by module pattern::

    PORT = Port(..., replace={"transformer_blocks.*.ff": "my_port.model.fused:FusedFeedForward"})

The class is called with the adapted module and returns a module with the same parameters: equal names, complete
shapes, dtypes and parts per rank. Under tensor parallelism the linears of the adapted module are split already; the
class may keep them. Its ``forward`` takes the arguments of the adapted module under the same names.

If the plan exchanges tokens in attention calls of the replaced module, the class must state with the attribute
``exchanges_tokens`` if it does so itself (True), or if it keeps the calls that the plan names (False).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from port_kit.autoparallel.plan import AttentionSite, Plan, find
from port_kit.errors import ParallelError
from port_kit.port import resolve
from port_kit.targets import Target, read_targets
from port_kit.upstream.checks import require

require("module_internals")

#: Hooks of a module that stay at its place, such as those that slice arguments for tensor-parallel ranks.
_HOOKS = (
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
)


def replace_modules(model: nn.Module, replace: Mapping[str, str], plan: Plan | None) -> Plan | None:
    """Replace modules in place, after tensor parallelism was applied and before tokens are sharded.

    Args:
        model: the transformer.
        replace: ``{pattern of modules: "module:Class"}``.
        plan: the plan, if there is one.

    Returns:
        The plan without the attention calls that replacements exchange tokens for.

    Raises:
        ParallelError: ``plan_replace``; a replacement has other parameters, or does not say who exchanges tokens.
            ``plan_pattern``; a pattern matches nothing.
    """
    for pattern, reference in replace.items():
        made: Any = resolve(reference)
        paths = list(find(model, pattern))
        plan = None if plan is None else _without_exchanges(model, plan, paths, made, reference)
        for path in paths:
            _replace(model, path, made, reference)
    return plan


def _replace(model: nn.Module, path: str, made: Any, reference: str) -> None:
    adapted = model.get_submodule(path)
    before = read_targets(adapted).targets
    module = made(adapted)
    if problems := list(_differences(before, read_targets(module).targets)):
        raise ParallelError(
            f"{reference} in place of {path} has other parameters than {type(adapted).__name__}: {'; '.join(problems)}",
            code="plan_replace",
            hint="give it parameters of the same names, shapes and dtypes, or keep the linears of the adapted module",
            problems=problems,
        )
    for name in _HOOKS:
        getattr(module, name).update(getattr(adapted, name))
    module.train(adapted.training)
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def _differences(before: Mapping[str, Target], after: Mapping[str, Target]) -> Iterator[str]:
    for name in before:
        if name not in after:
            yield f"{name} is missing"
        elif (want := _layout(before[name])) != (got := _layout(after[name])):
            yield f"{name}: expected {want}, found {got}"
    yield from (f"{name} is unexpected" for name in after if name not in before)


def _layout(target: Target) -> str:
    """Return the complete shape, the dtype, the kind, and this rank's part in words."""
    kind = "buffer" if target.spec.buffer else "parameter"
    held = [(shard.name, shard.held) for shard in target.shards or ()]
    part = f", of it {held}" if target.spec.shape != tuple(target.tensor.shape) or len(held) > 1 else ""
    return f"{kind} {tuple(target.spec.shape)} {target.spec.dtype}{part}"


def _without_exchanges(model: nn.Module, plan: Plan, paths: Sequence[str], made: Any, reference: str) -> Plan:
    """Return the plan without the attention calls inside of the paths if the replacement exchanges tokens itself."""
    inside = [site for site in plan.attention if _is_inside(model, site, paths, reference)]
    exchanges = getattr(made, "exchanges_tokens", None)
    if inside and exchanges is None:
        raise ParallelError(
            f"{reference}: expected exchanges_tokens, as the plan exchanges tokens in {inside[0].module}; found none",
            code="plan_replace",
            hint="set it on the class: True if it exchanges tokens, False if it keeps the calls that the plan names",
        )
    if not exchanges:
        return plan
    return plan.model_copy(update={"attention": tuple(site for site in plan.attention if site not in inside)})


def _is_inside(model: nn.Module, site: AttentionSite, paths: Sequence[str], reference: str) -> bool:
    """Return True if all modules of a site are replaced, False if none is."""
    replaced = [any(f"{found}.".startswith(f"{path}.") for path in paths) for found in find(model, site.module)]
    if any(replaced) != all(replaced):
        raise ParallelError(
            f"{reference} replaces some modules of {site.module}, and not all of them",
            code="plan_replace",
            hint=f"replace all modules that match {site.module}",
        )
    return any(replaced)
