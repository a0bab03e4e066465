"""Which rules match a name, found once a layer template.

Numbers between dots are layer indices unless some pattern spells them out (``ffn\\.0``), so all names of one template
take the same rules; see :func:`port_kit.remap.patterns.literal_numbers`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from port_kit.remap.patterns import MAX_NAME_LENGTH, compile_pattern, literal_numbers
from port_kit.remap.rules import Rule

Found = tuple[int, ...]


class Matcher:
    """Finds the rules that match a name.

    Args:
        rules: the rules; ``keep`` rules never match a source.
    """

    def __init__(self, rules: Sequence[Rule]) -> None:
        self.rules = rules
        self._patterns = {number: compile_pattern(rule.source) for number, rule in enumerate(rules) if rule.source}
        numbers = [literal_numbers(rule.source) for rule in rules if rule.source]
        #: numbers that patterns tell apart; None where names have to be matched one by one
        self.literal: frozenset[str] | None = None
        if None not in numbers:
            self.literal = frozenset().union(*[found for found in numbers if found is not None])
        self._known: dict[str, Found] = {}

    def template(self, name: str) -> str:
        """The name with ``#`` for every number that no pattern tells from others."""
        if self.literal is None:
            return name
        parts = name.split(".")
        for at, part in enumerate(parts):
            if part.isdecimal() and part not in self.literal:
                parts[at] = "#"
        return ".".join(parts)

    def find(self, name: str) -> Found:
        """Numbers of the rules that match: all ordinary ones, else the fallback ones."""
        template = self.template(name)
        found = self._known.get(template)
        if found is None:
            found = self._known[template] = self._search(name)
        return found

    def match(self, number: int, name: str) -> re.Match[str]:
        """The match of a rule that :meth:`find` gave."""
        match = self._patterns[number].fullmatch(name)
        assert match is not None
        return match

    def _search(self, name: str) -> Found:
        if len(name) > MAX_NAME_LENGTH:
            return ()
        found = [number for number, pattern in self._patterns.items() if pattern.fullmatch(name)]
        ordinary = tuple(number for number in found if not self.rules[number].fallback)
        return ordinary or tuple(found)
