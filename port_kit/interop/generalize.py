"""Generalize mappings of single names to rules: names that differ only in numbers share a rule."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from port_kit.remap.names import NUMBER
from port_kit.remap.patterns import generalize_names
from port_kit.remap.rules import Op, Rule


class Route(NamedTuple):
    """Destination of one source tensor.

    Attributes:
        targets: names of the targets; none if the tensor is dropped.
        shard: the rule's ``shard``.
        op: the rule's ops.
        position: index on the stacked axis, for ``into``.
        into: the rule's ``into``, with ``{}`` for the position.
    """

    targets: tuple[str, ...]
    shard: str = ""
    op: tuple[Op, ...] = ()
    position: str = ""
    into: str = ""

    @property
    def texts(self) -> tuple[str, ...]:
        """Everything that may depend on the numbers in the source name."""
        return (*self.targets, self.shard, self.position)

    @property
    def kind(self) -> object:
        """The route without its numbers."""
        return (len(self.targets), self.op, self.into, *(tuple(NUMBER.split(text)) for text in self.texts))


Routes = Mapping[str, tuple[Route, ...]]


def generalize(routes: Routes) -> Iterator[Rule]:
    """Yield rules that give each name exactly its routes; each name matches one pattern.

    A number is a group of the pattern if it differs between names. If patterns would match each other's names, or a
    number of a target is none of the source's, each name gets a pattern of its own.
    """
    alike: dict[tuple[str, ...], dict[str, tuple[Route, ...]]] = {}
    for name, found in routes.items():
        alike.setdefault(tuple(NUMBER.split(name)), {})[name] = found
    for members in alike.values():
        groups: dict[object, dict[str, tuple[Route, ...]]] = {}
        for name, found in members.items():
            groups.setdefault(tuple(route.kind for route in found), {})[name] = found
        made = [_rules(group) for group in groups.values()]
        patterns = [rules[0].source for rules in made if rules]
        if not all(sum(re.fullmatch(text, name) is not None for text in patterns) == 1 for name in members):
            made = [_rules({name: found}) for name, found in members.items()]
        yield from (rule for rules in made for rule in rules)


def _rules(group: Routes) -> list[Rule]:
    """Write the rules for names that have the same kind of routes; none if their numbers do not allow it."""
    rules = []
    for routes in zip(*group.values(), strict=True):
        found = generalize_names(list(group), [route.texts for route in routes])
        if found is None:
            return []
        source, (*targets, shard, position) = found
        if not targets:
            rules.append(Rule(source, drop="the imported mapping drops it"))
            continue
        target, into = targets[0] if len(targets) == 1 else tuple(targets), routes[0].into.replace("{}", position)
        rules.append(Rule(source, target, shard, routes[0].op, into=into))
    return rules
