"""Rules that load an original checkpoint into a module that a plan has changed.

Names do not change. A dimension that consists of several parts, each split over the ranks, is put in rank order: first
the parts of rank 0. Each rank then reads consecutive entries, and only those.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence

from port_kit.autoparallel.plan import generalize
from port_kit.autoparallel.tensor.apply import Applied
from port_kit.remap import Op, Rule, RuleSet


def weight_rules(applied: Applied, name: str) -> RuleSet:
    """Return the rules for the parameters of a module.

    Args:
        applied: result of :func:`~port_kit.autoparallel.tensor.apply.apply_tensor_parallelism`.
        name: name of the rule set.
    """
    patterns: dict[tuple[str, int, tuple[int, ...]], list[str]] = defaultdict(list)
    for parameter, (dim, parts) in applied.parts.items():
        if len(parts) > 1:
            patterns[generalize(parameter), dim, parts].append(parameter)
    spread = [pattern for pattern, *_ in patterns]
    rules = []
    for (pattern, dim, parts), members in patterns.items():
        op = Op.of("reorder", dim=dim, runs=rank_order(parts, applied.ranks))
        # a list whose blocks differ in size needs a rule per block
        sources = [_expression(pattern)] if spread.count(pattern) == 1 else [_expression(one) for one in members]
        rules += [Rule(source, target=r"\1", op=(op,)) for source in sources]
    return RuleSet(name, (*rules, Rule("(.+)", target=r"\1", fallback=True)))


def rank_order(parts: Sequence[int], ranks: int) -> tuple[tuple[int, int], ...]:
    """Return the runs of a dimension in rank order: the r-th slice of each part, for each rank r."""
    starts = [sum(parts[:at]) for at in range(len(parts))]
    return tuple(
        (start + rank * (size // ranks), start + (rank + 1) * (size // ranks))
        for rank in range(ranks)
        for start, size in zip(starts, parts, strict=True)
    )


def _expression(pattern: str) -> str:
    return "(" + r"\.".join(r"[^.]+" if part == "*" else re.escape(part) for part in pattern.split(".")) + ")"
