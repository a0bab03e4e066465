r"""Remap: bring the tensors of a checkpoint into a module, with every element accounted for.

A :class:`RuleSet` is data. Compiled against a source and a target manifest it gives a
:class:`~port_kit.remap.plan.Plan` of writes; loading, coverage, export and explanations all read those writes.

The language, one field of :class:`Rule` a line::

    source    regular expression over a whole source name          r"blocks\.(\d+)\.attn\.(q|k|v)\.weight"
    target    template over its groups: \1, \g<name>, {\1 // 4}    r"layers.\1.attn.qkv.weight"
    shard     slot of a fused target, or part of a joining op      r"\2"       q k v, 0 1, expert.w1
    take      the part of the source that is used, before the ops  "[0:3*h, :]"
    into      the part of the target that is written               r"[\2, 0:ffn]"
    op        one op or a list, applied in order:
                reshape(shape)            to these sizes, -1 once; without a shape: to the target's
                transpose(perm)           all axes; without perm: the last two change places
                rearrange(pattern, ...)   "(h two d) c -> (two h d) c", named sizes as expressions
                reorder(dim, runs) or reorder(dim, parts, order)     slices of one axis in a new order
                split(dim, sizes)         one part a target; without sizes: the targets' own, or equal parts
                concat(dim, parts, sizes) many sources, the part is in shard; without sizes: the sources' own
                stack(dim)                many sources on a new axis, the index is in shard
                fill                      one value in every element of its place (a scale that slots share)
                cast(dtype)               allows the loss that an assignment would refuse
                weight_norm(dim)          shard is g or v: direction times magnitude, folded
                any transform registered with port_kit.remap.transforms.transform
    drop      the reason why a source is not used (with take: why that part is not)
    keep      the reason why a target (a regular expression) keeps what it was built with
    optional  the rule may match nothing
    fallback  tried only on names that no other rule matches
    variant   "choice:spelling": exactly one spelling of a choice is in the checkpoint, e.g. weight_norm:g_v

Sizes are integers or arithmetic (+ - * // %, brackets) over the rule set's ``sizes``, the ``sizes=`` given to compile
or load, the source's own extents (``in0``, ``in1`` ...), and a rule's numeric groups (``\1`` or by name). A source that
matches two rules is an error, unless each of them has ``take``. ``RuleSet.under(source, target)`` puts a set under
prefixes, ``|`` joins, ``extend`` adds, ``override`` inherits and replaces, ``to_toml``/``from_toml`` and ``to_python``
write and read it.

A checkpoint that already has the target's names passes through unchanged.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from port_kit.remap.rules import Op, Rule, RuleSet

if TYPE_CHECKING:
    from port_kit.remap.coverage import coverage
    from port_kit.remap.load import WeightLoader, load_components, load_weights
    from port_kit.remap.plan import Plan, Write
    from port_kit.remap.transforms import transform

_LAZY = {
    "Plan": "plan",
    "Write": "plan",
    "WeightLoader": "load",
    "load_components": "load",
    "load_weights": "load",
    "coverage": "coverage",
    "transform": "transforms",
}

__all__ = [
    "Op",
    "Plan",
    "Rule",
    "RuleSet",
    "WeightLoader",
    "Write",
    "coverage",
    "load_components",
    "load_weights",
    "transform",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
