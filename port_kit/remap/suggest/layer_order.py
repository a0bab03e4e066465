"""Order of layers if shapes alone allow more than one.

The members of a block move together: the matches whose shapes allow one order decide for the others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

from port_kit.remap.suggest.alignment import Alignment, alignments
from port_kit.remap.suggest.match import Match
from port_kit.remap.suggest.module_groups import INDEX_SLOT, ModuleGroup

#: (list of the source, list of the target, index in the source, index in the target)
_Vote = tuple[tuple[str, ...], tuple[str, ...], int, int]


def resolve_layer_order(found: Sequence[Match]) -> list[Match]:
    """Give every match of open order the one that most of its surroundings have."""
    options = [list(alignments(item.source, item.target)) for item in found]
    votes: Counter[_Vote] = Counter()
    for item, choices in zip(found, options, strict=True):
        if len(choices) == 1:
            votes.update(_votes(item, choices[0]))
    return [
        replace(item, alignment=max(choices, key=lambda choice: sum(votes[vote] for vote in _votes(item, choice))))
        if len(choices) > 1
        else item
        for item, choices in zip(found, options, strict=True)
    ]


def _votes(item: Match, choice: Alignment) -> Iterator[_Vote]:
    lists = _outer_list(item.source), _outer_list(item.target)
    for target, source in choice.pairs.items():
        if source and target:
            yield *lists, source[0], target[0]


def _outer_list(group: ModuleGroup) -> tuple[str, ...]:
    depth = next((depth for depth, part in enumerate(group.parts) if INDEX_SLOT in part), len(group.parts))
    return group.parts[: depth + 1]
