"""Rules as data, checked when they are made. See :mod:`port_kit.remap` for the language.

Patterns, templates, size expressions and op arguments that cannot work raise :class:`~port_kit.errors.RemapError`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from port_kit.errors import RemapError
from port_kit.escape import quoted, shortened
from port_kit.remap.ops import Op, check_ops, check_region, rules_error
from port_kit.remap.patterns import compile_pattern, parse_size, parse_template

#: Values of named sizes.
Sizes = Mapping[str, int]
_TEXT_FIELDS = ("source", "target", "shard", "take", "into", "drop", "keep", "variant", "confidence", "note")
_FLAGS = ("optional", "fallback")
_SIZE_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")


@dataclass(frozen=True)
class Rule:
    r"""One rule. The fields that are given decide its kind: map (``target``), ``drop``, or ``keep``.

    Attributes:
        source, shard, take, into, drop, optional, fallback, variant: as in the language.
        target: a template, or several for ``split``; with ``keep`` a regular expression over target names.
        op: an :class:`Op`, its name if it needs no arguments, or several, applied in order.
        keep: the reason why the matching targets keep their initial values.
        confidence: of a suggested rule, ``certain`` or ``likely``; has no effect.
        note: a comment; has no effect.
    """

    source: str = ""
    target: str | tuple[str, ...] = ""
    shard: str | tuple[str, ...] = ""
    op: tuple[Op, ...] = ()
    take: str = ""
    into: str = ""
    drop: str = ""
    keep: str = ""
    optional: bool = False
    fallback: bool = False
    variant: str = ""
    confidence: str = ""
    note: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "op", Op.many(self.op))
        for name in ("target", "shard"):
            object.__setattr__(self, name, _texts(getattr(self, name)))
        self._check_types()
        self._check_purpose()
        if self.source:
            self._check_mapping()

    @cached_property
    def targets(self) -> tuple[str, ...]:
        """The target templates, one per shard."""
        if isinstance(self.target, str):
            return (self.target,) * (len(self.shard) if isinstance(self.shard, tuple) else 1)
        return self.target

    @cached_property
    def shards(self) -> tuple[str, ...]:
        """The shard templates, one per target."""
        return self.shard if isinstance(self.shard, tuple) else (self.shard,) * len(self.targets)

    @cached_property
    def join(self) -> Op | None:
        """The op that joins several sources, if there is one."""
        return self.op[-1] if self.op and self.op[-1].joins else None

    @cached_property
    def uses_groups(self) -> bool:
        """Numbers in the rule's regions or ops depend on the groups of its pattern."""
        texts = [self.take, self.into, *(str(op.args) for op in self.op)]
        names = "|".join([r"_\d+", *(compile_pattern(self.source).groupindex if self.source else ())])
        return any("\\" in text or re.search(rf"\b(?:{names})\b", text) is not None for text in texts if text)

    @property
    def label(self) -> str:
        """The rule's name in messages."""
        return self.source or f"keep {self.target}"

    def to_dict(self) -> dict[str, Any]:
        """Return the form in TOML and JSON: only the fields that are set."""
        texts = {name: getattr(self, name) for name in _TEXT_FIELDS}
        data = {name: list(text) if isinstance(text, tuple) else text for name, text in texts.items() if text}
        if self.op:
            data["op"] = [op.to_dict() for op in self.op]
        return data | {name: True for name in _FLAGS if getattr(self, name)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Rule:
        """Read the form of :meth:`to_dict`.

        Raises:
            RemapError: ``remap_rules`` for an unknown field.
        """
        unknown = set(data) - set(cls.__dataclass_fields__)
        if unknown:
            message = f"rule {quoted(data.get('source'))} has unknown fields {sorted(unknown)}"
            raise rules_error(message, f"fields: {', '.join(cls.__dataclass_fields__)}")
        return cls(**data)

    def _check_types(self) -> None:
        for name in _TEXT_FIELDS:
            value = getattr(self, name)
            for text in value if isinstance(value, tuple) else (value,):
                if not isinstance(text, str) or any("\ud800" <= letter <= "\udfff" for letter in text):
                    raise rules_error(f"{name} is {quoted(value)}", "it must be a text")
        for name in _FLAGS:
            if type(getattr(self, name)) is not bool:
                raise rules_error(f"{name} is {quoted(getattr(self, name))}", "it must be true or false")

    def _check_purpose(self) -> None:
        purposes = [name for name in ("target", "drop", "keep") if getattr(self, name)]
        if purposes not in (["target"], ["drop"], ["target", "keep"]):
            found = " and ".join(purposes) or "neither target, drop nor keep"
            hint = "a rule has a source with a target, a source with drop, or a target with keep"
            raise rules_error(f"rule {quoted(self.label)} has {found}", hint)
        if bool(self.source) == bool(self.keep):
            expected = "no source" if self.keep else "a source"
            raise rules_error(f"rule {quoted(self.label)} needs {expected}", "keep is about targets")
        if self.keep and not isinstance(self.target, str):
            raise rules_error(
                f"rule {quoted(self.label)} keeps several targets", "write them as one regular expression"
            )
        if self.keep:
            compile_pattern(str(self.target))

    def _check_mapping(self) -> None:
        if len(self.shards) != len(self.targets):
            message = f"rule {quoted(self.label)} has {len(self.targets)} targets and {len(self.shards)} shards"
            raise rules_error(message, "give one shard per target, or one target for all shards")
        if self.variant and self.variant.count(":") != 1:
            raise rules_error(f"variant {quoted(self.variant)} is not choice:spelling", "for example weight_norm:g_v")
        pattern = compile_pattern(self.source)
        for text in (*self.targets, *self.shards):
            _check_template(text, pattern)
        check_ops(self.op, self.label, len(self.targets), has_shard=bool(self.shard))
        check_region(self.take)
        check_region(self.into)


@dataclass(frozen=True)
class Rules:
    """An ordered collection of rules with its named sizes; :class:`~port_kit.remap.rules.RuleSet` composes them.

    Attributes:
        name: the name in messages and reports.
        rules: the rules; their order decides only the order of reports.
        sizes: named sizes, integers or expressions over other sizes; ``sizes=`` of a compilation adds and overrides.
        allow_downcast: floating-point values may be rounded to the target's dtype.
    """

    name: str
    rules: tuple[Rule, ...] = ()
    sizes: Mapping[str, int | str] = field(default_factory=dict, hash=False)
    allow_downcast: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "rules", tuple(self.rules))
        object.__setattr__(self, "sizes", dict(self.sizes))
        for size, value in self.sizes.items():
            if not _SIZE_NAME.fullmatch(size):
                raise rules_error(
                    f"size name {quoted(size)} is not a word", "letters, digits and _, not starting with _"
                )
            if isinstance(value, str):
                parse_size(value)
        for rule, count in Counter(self.rules).items():
            if count > 1:
                raise rules_error(f"rule {quoted(rule.label)} is in {self.name} twice", "remove one of them")

    def __iter__(self) -> Iterator[Rule]:
        return iter(self.rules)

    def __len__(self) -> int:
        return len(self.rules)


def _texts(value: object) -> object:
    """Read a text or several; a number is read as its digits."""
    if isinstance(value, (list, tuple)) and value:
        return tuple(map(_texts, value))
    return str(value) if type(value) is int else value


def _check_template(text: str, pattern: re.Pattern[str]) -> None:
    for group in parse_template(text).groups():
        known = int(group) <= pattern.groups if group.isdigit() else group in pattern.groupindex
        if not known or group == "0":
            lacking = f"pattern {quoted(pattern.pattern)} does not have"
            message = f"template {quoted(text)} refers to group {shortened(group)}, which {lacking}"
            hint = f"the pattern has {pattern.groups} groups"
            raise RemapError(message, code="remap_template", hint=hint, template=text, rule=pattern.pattern)
