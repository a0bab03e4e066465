"""Inference of the split of one block."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from torch import nn

from port_kit.autoparallel.tensor.blocks import Arguments, is_linear
from port_kit.autoparallel.tensor.groups import Groups, find_groups
from port_kit.autoparallel.tensor.norms import NormKind, full_width_norms
from port_kit.autoparallel.tensor.trace import Connections, Node, trace
from port_kit.autoparallel.tensor.values import Number, find_values

#: Runs with different inputs, whose connections are united: a channel may be inactive in one of them.
SEEDS = (0, 1, 2)


@dataclass
class BlockSplit:
    """The split of one block.

    Attributes:
        groups: linears, norms, parameters and inputs that are split.
        norms: kind of each norm over channels that are split.
        values: numbers to divide.
        refused: reasons for linears that are not split although their channels are independent.
        used: linears whose output has an effect.
        mixing: groups in which one position depends on several positions before.
    """

    groups: Groups
    norms: dict[str, NormKind] = field(default_factory=dict)
    values: tuple[Number, ...] = ()
    refused: list[str] = field(default_factory=list)
    mixing: set[int] = field(default_factory=set)
    used: set[str] = field(default_factory=set)


def analyze_block(block: nn.Module, given: Arguments, skip: set[str], whole: Collection[str] = ()) -> BlockSplit:
    """Infer the split of a block.

    Args:
        block: in evaluation mode, with random values.
        given: arguments of a call.
        skip: linears that are called from outside of the block.
        whole: linears that stay whole, because another block of the list needs them whole.
    """
    norms = full_width_norms(block, given)
    found = _connections(block, given, skip, cut=set(), probe=set(norms))
    if found.one_to_one:
        found = _connections(block, given, skip, cut=found.one_to_one, probe=set())
    used = {node.side.module for node in (*found.parents, *found.exits) if node.side.kind == "out"}
    found.exits.update(
        Node(side, channel) for side, size in found.sizes.items() if side.module in whole for channel in range(size)
    )
    weights = {path: module.weight.numel() for path, module in block.named_modules() if is_linear(module)}  # type: ignore[union-attr]
    refused: list[str] = []
    while True:
        groups = find_groups(found, weights)
        if not groups.sides:
            return BlockSplit(groups, refused=refused, used=used)
        values, failure = find_values(block, given, groups)
        if failure is None:
            break
        refused.append(_leave_whole(found, groups, failure.group, failure.reason))
    own = {path: norms[path] for path in groups.of("norm")}
    return BlockSplit(groups, own, values, refused, _mixing_groups(found, groups), used)


def _mixing_groups(found: Connections, groups: Groups) -> set[int]:
    mixing: set[int] = set()
    for side, segments in groups.sides.items():
        owners = [segment.group for segment in segments for _ in range(segment.size)]
        mixing.update(group for channel, group in enumerate(owners) if Node(side, channel) in found.mixing)
    return mixing


def _leave_whole(found: Connections, groups: Groups, group: int | None, reason: str) -> str:
    """Mark the linears of a group, or of all groups, as needed whole; return the reason."""
    sides = [
        side for side, segments in groups.sides.items() if group is None or any(s.group == group for s in segments)
    ]
    found.exits.update(node for node in found.parents if node.side in sides)
    return f"{', '.join(sorted({side.module for side in sides}))}: {reason}"


def _connections(block: nn.Module, given: Arguments, skip: set[str], cut: set[str], probe: set[str]) -> Connections:
    found = Connections()
    for seed in SEEDS:
        trace(block, given, skip=skip, cut=cut, probe=probe, seed=seed, into=found)
        found.one_to_one &= probe
    return found
