"""Which layer of one list is which of another, where shapes alone allow more than one order.

The members of a block move together: what the unambiguous ones say about their outer index decides for the rest.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace

from port_kit.remap.suggest.alignment import Alignment, alignments
from port_kit.remap.suggest.match import Match
from port_kit.remap.suggest.module_groups import INDEX_SLOT, ModuleGroup

#: (list of the source, list of the target)
_Lists = tuple[tuple[str, ...], tuple[str, ...]]
#: list pair -> (source index, target index) -> how many tensors say so
_Votes = dict[_Lists, Counter[tuple[int, int]]]


def resolve_layer_order(found: Sequence[Match]) -> list[Match]:
    """Give every match whose order is open the order of its surroundings."""
    options = [list(alignments(item.source, item.target)) for item in found]
    votes = _votes(found, options)
    return [
        _best_supported(item, choices, votes) if len(choices) > 1 else item
        for item, choices in zip(found, options, strict=True)
    ]


def _votes(found: Sequence[Match], options: Sequence[Sequence[Alignment]]) -> _Votes:
    votes: _Votes = defaultdict(Counter)
    for item, choices in zip(found, options, strict=True):
        if len(choices) == 1:
            for lists, pair in _outer_pairs(item, choices[0]):
                votes[lists][pair] += 1
    return votes


def _best_supported(item: Match, choices: Sequence[Alignment], votes: _Votes) -> Match:
    def support(choice: Alignment) -> int:
        return sum(votes[lists][pair] for lists, pair in _outer_pairs(item, choice) if lists in votes)

    return replace(item, alignment=max(choices, key=support))


def _outer_pairs(item: Match, choice: Alignment) -> Iterator[tuple[_Lists, tuple[int, int]]]:
    lists = (_outer_list(item.source), _outer_list(item.target))
    for target, source in choice.pairs.items():
        if source and target:
            yield lists, (source[0], target[0])


def _outer_list(group: ModuleGroup) -> tuple[str, ...]:
    depth = next((depth for depth, part in enumerate(group.parts) if INDEX_SLOT in part), len(group.parts))
    return group.parts[: depth + 1]
