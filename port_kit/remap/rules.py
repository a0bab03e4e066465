"""Rules and rule sets as data: what a port says about its checkpoint, before any checkpoint is looked at.

See :mod:`port_kit.remap` for the language. Everything here is checked when it is made: patterns, templates, size
expressions and op arguments that cannot work raise :class:`~port_kit.errors.RemapError` at once.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from port_kit.errors import RemapError
from port_kit.remap.expressions import parse
from port_kit.remap.patterns import compile_pattern, literal_template, parse_template

if TYPE_CHECKING:
    from port_kit.manifest import Manifest
    from port_kit.remap.plan import Plan

_TEXT_FIELDS = ("source", "target", "shard", "take", "into", "drop", "keep", "variant", "confidence", "note")
_SIZE_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")


@dataclass(frozen=True)
class Op:
    """One operation of a rule, by name: ``Op.of("split", dim=0, sizes=("q", "kv", "kv"))``.

    Attributes:
        name: a key of :data:`port_kit.remap.ops.OPS` or the name of a registered transform.
        args: the arguments, sorted by name; lists are tuples.
    """

    name: str
    args: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def of(cls, name: str, **args: object) -> Op:
        """Make an op from keyword arguments."""
        return cls(name, tuple(sorted((key, _frozen(value)) for key, value in args.items())))

    def get(self, key: str, default: Any = None) -> Any:
        """Return the argument called ``key``."""
        return dict(self.args).get(key, default)

    def to_dict(self) -> dict[str, Any]:
        """The form in TOML and JSON: ``{"name": "split", "dim": 0, ...}``."""
        return {"name": self.name, **{key: _thawed(value) for key, value in self.args}}


@dataclass(frozen=True)
class Rule:
    r"""One rule. Which fields are given decides what it does: map (``target``), ``drop``, or ``keep``.

    Attributes:
        source: regular expression that matches a whole source name.
        target: template of the target name over the groups, ``blocks.\1.attn.qkv.\2``; several for ``split``.
            With ``keep``: a regular expression over target names.
        shard: template of the slot of a fused target (``q``, ``\3``, ``0``), or the part of ``concat``, ``stack`` or of
            a transform that joins several sources; several for ``split``, one a part.
        op: an :class:`Op`, its name where it takes no arguments, or several, applied in order.
        take: the part of the source that this rule uses, before its ops, as ``[0:3*h, :]``.
        into: the part of the target that is written, after its ops, as ``[\2, 0:ffn]``.
        drop: the reason why the matching sources are not used.
        keep: the reason why the matching targets keep what they were built with.
        optional: the rule may match nothing.
        fallback: the rule is tried only on names that no other rule matches (``Rule(r"(.*)", r"\1", fallback=True)``).
        variant: ``choice:spelling``; of the rules of one choice exactly one spelling must be in the checkpoint.
        confidence: of a suggested rule, ``certain`` or ``likely``; decides nothing.
        note: words for people; decides nothing.
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
        object.__setattr__(self, "op", _ops(self.op))
        for name in ("target", "shard"):
            object.__setattr__(self, name, _texts(name, getattr(self, name)))
        _check_types(self)
        check_rule(self)

    @cached_property
    def targets(self) -> tuple[str, ...]:
        """The target templates, also where there is one."""
        if isinstance(self.target, str):
            return (self.target,) * (len(self.shard) if isinstance(self.shard, tuple) else 1)
        return self.target

    @cached_property
    def shards(self) -> tuple[str, ...]:
        """The slot templates, one a target."""
        return self.shard if isinstance(self.shard, tuple) else (self.shard,) * len(self.targets)

    @property
    def label(self) -> str:
        """How messages call the rule."""
        return self.source or f"keep {self.target}"

    def to_dict(self) -> dict[str, Any]:
        """The form in TOML and JSON: only the fields that are set."""
        data: dict[str, Any] = {}
        for name in _TEXT_FIELDS:
            value = getattr(self, name)
            if value:
                data[name] = list(value) if isinstance(value, tuple) else value
        if self.op:
            data["op"] = [op.to_dict() for op in self.op]
        data.update({name: True for name in ("optional", "fallback") if getattr(self, name)})
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Rule:
        """Read the form that :meth:`to_dict` gives.

        Raises:
            RemapError: ``remap_rules`` for a field that rules do not have.
        """
        unknown = set(data) - set(cls.__dataclass_fields__)
        if unknown:
            raise _error(
                f"rule {data.get('source')!r} has unknown fields {sorted(unknown)}",
                f"fields: {', '.join(cls.__dataclass_fields__)}",
            )
        return cls(**data)


def _texts(field_name: str, value: object) -> str | tuple[str, ...]:
    """A text, or several; a number stands for its digits."""
    if type(value) is int or isinstance(value, str):
        return str(value)
    if isinstance(value, (list, tuple)) and value and all(type(item) is int or isinstance(item, str) for item in value):
        return tuple(map(str, value))
    raise _error(f"{field_name} is {value!r}", "it is a text, or a list of texts")


def _check_types(rule: Rule) -> None:
    """Refuse what a file may say and no rule means."""
    for name in _TEXT_FIELDS:
        value = getattr(rule, name)
        for text in value if isinstance(value, tuple) else (value,):
            if not isinstance(text, str) or any("\ud800" <= letter <= "\udfff" for letter in text):
                raise _error(f"{name} is {value!r}", "it is a text")
    for name in ("optional", "fallback"):
        if type(getattr(rule, name)) is not bool:
            raise _error(f"{name} is {getattr(rule, name)!r}", "it is true or false")


def check_rule(rule: Rule) -> None:
    """Refuse a rule that can never work, whatever the checkpoint."""
    purposes = [name for name in ("target", "drop", "keep") if getattr(rule, name)]
    if purposes not in (["target"], ["drop"], ["target", "keep"]):
        raise _error(
            f"rule {rule.label!r} says {' and '.join(purposes) or 'nothing'}",
            "a rule has a source with a target, a source with drop, or a target with keep",
        )
    if bool(rule.source) == bool(rule.keep):
        raise _error(f"rule {rule.label!r} needs {'no source' if rule.keep else 'a source'}", "keep is about targets")
    if rule.keep:
        if not isinstance(rule.target, str):
            raise _error(f"rule {rule.label!r} keeps several targets", "write them as one regular expression")
        compile_pattern(rule.target)
        return
    if len(rule.shards) != len(rule.targets):
        raise _error(
            f"rule {rule.label!r} has {len(rule.targets)} targets and {len(rule.shards)} shards",
            "give one shard a target, or one target for all shards",
        )
    if rule.variant and rule.variant.count(":") != 1:
        raise _error(f"variant {rule.variant!r} is not choice:spelling", "for example weight_norm:g_v")
    pattern = compile_pattern(rule.source)
    for text in (*rule.targets, *rule.shards):
        _check_template(text, pattern)
    from port_kit.remap.ops import check_rule_ops  # ops build on Op: imported late

    check_rule_ops(rule)


def _check_template(text: str, pattern: re.Pattern[str]) -> None:
    for group in parse_template(text).groups():
        known = int(group) <= pattern.groups if group.isdigit() else group in pattern.groupindex
        if not known or group == "0":
            raise RemapError(
                f"template {text!r} names group {group}, which pattern {pattern.pattern!r} does not have",
                code="remap_template",
                hint=f"the pattern has {pattern.groups} groups",
                template=text,
                rule=pattern.pattern,
            )
    for part in parse_template(text).parts:
        if not isinstance(part, str) and part[0] == "size":
            parse(part[1])


@dataclass(frozen=True)
class RuleSet:
    """An ordered set of rules with its named sizes.

    Attributes:
        name: how messages and reports call it.
        rules: the rules; order decides nothing but the order of reports.
        sizes: named sizes, integers or expressions over other sizes; ``compile(sizes=...)`` adds and overrides.
        narrow: floating-point values may be stored in a narrower floating type on loading and in coverage.
    """

    name: str
    rules: tuple[Rule, ...] = ()
    sizes: Mapping[str, int | str] = field(default_factory=dict, hash=False)
    narrow: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "rules", tuple(self.rules))
        object.__setattr__(self, "sizes", dict(self.sizes))
        for size, value in self.sizes.items():
            if not _SIZE_NAME.fullmatch(size):
                raise _error(f"size name {size!r} is not a word", "letters, digits and _, not starting with _")
            if isinstance(value, str):
                parse(value)
        seen: set[Rule] = set()
        for rule in self.rules:
            if rule in seen:
                raise _error(f"rule {rule.label!r} stands twice in {self.name}", "remove one of them")
            seen.add(rule)

    def __iter__(self) -> Iterator[Rule]:
        return iter(self.rules)

    def __len__(self) -> int:
        return len(self.rules)

    # -- making sets from sets ---------------------------------------------------------------------------------

    def extend(self, rules: Iterable[Rule], *, name: str = "", **sizes: int | str) -> RuleSet:
        """Return this set with more rules; nothing of it is replaced."""
        return replace(self, name=name or self.name, rules=(*self.rules, *rules), sizes={**self.sizes, **sizes})

    def override(self, rules: Iterable[Rule], *, name: str = "", **sizes: int | str) -> RuleSet:
        """Return a set that inherits from this one: each given rule replaces the rules with the same source pattern
        (for ``keep``: the same target pattern); every one of them must replace something.

        Raises:
            RemapError: ``remap_rules`` where a rule overrides nothing.
        """
        rules = tuple(rules)
        places = {_place(rule) for rule in rules}
        known = {_place(rule) for rule in self.rules}
        stray = [rule.label for rule in rules if _place(rule) not in known]
        if stray:
            raise _error(f"{', '.join(stray)} overrides nothing in {self.name}", "use extend for new rules")
        kept = [rule for rule in self.rules if _place(rule) not in places]
        return replace(self, name=name or self.name, rules=(*rules, *kept), sizes={**self.sizes, **sizes})

    def without(self, *sources: str) -> RuleSet:
        """Return this set without the rules that have these source patterns."""
        known = {rule.source for rule in self.rules}
        stray = [source for source in sources if source not in known]
        if stray:
            raise _error(f"{self.name} has no rule for {', '.join(stray)}", "give the source patterns as written")
        return replace(self, rules=tuple(rule for rule in self.rules if rule.source not in sources))

    def under(self, source: str = "", target: str = "", *, name: str = "") -> RuleSet:
        """Return this set with all names under a prefix: ``rules.under("text_model.", "text_encoder.")``."""
        return replace(
            self,
            name=name or self.name,
            rules=tuple(_prefixed(rule, source, target) for rule in self.rules),
        )

    def __or__(self, other: RuleSet) -> RuleSet:
        """Join two sets; a size with two values is an error."""
        clash = [size for size in self.sizes if other.sizes.get(size, self.sizes[size]) != self.sizes[size]]
        if clash:
            raise _error(f"{self.name} and {other.name} differ in the sizes {clash}", "rename one of them")
        joined = self.extend(other.rules, name=f"{self.name}+{other.name}", **other.sizes)
        return replace(joined, narrow=self.narrow or other.narrow)

    # -- other forms -------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """The form in TOML and JSON."""
        data: dict[str, Any] = {"name": self.name}
        if self.narrow:
            data["narrow"] = True
        if self.sizes:
            data["sizes"] = dict(self.sizes)
        return data | {"rule": [rule.to_dict() for rule in self.rules]}

    def to_toml(self) -> str:
        """The set as TOML; :meth:`from_toml` reads the same set back."""
        from port_kit.remap.toml import dumps

        return dumps(self)

    def to_python(self) -> str:
        """The set as Python source that makes the same set."""
        from port_kit.remap.toml import to_python

        return to_python(self)

    @classmethod
    def from_toml(cls, text: str, *, folder: Path | None = None) -> RuleSet:
        """Read TOML; ``extends`` and ``[[include]]`` name files relative to ``folder`` or ``module:ATTRIBUTE``."""
        from port_kit.remap.toml import loads

        return loads(text, folder=folder)

    @classmethod
    def from_file(cls, path: str | Path) -> RuleSet:
        """Read a ``.toml`` or ``.json`` file of rules."""
        from port_kit.remap.toml import load

        return load(Path(path))

    def compile(
        self, source: Manifest, target: Manifest, sizes: Mapping[str, int] | None = None, **options: bool
    ) -> Plan:
        """Compile against two manifests; see :func:`port_kit.remap.plan.compile_plan`."""
        from port_kit.remap.plan import compile_plan

        return compile_plan(self, source, target, sizes or {}, **options)


def _place(rule: Rule) -> tuple[str, str]:
    return (rule.source, "") if rule.source else ("", str(rule.target))


def _prefixed(rule: Rule, source: str, target: str) -> Rule:
    escaped = literal_template(target)
    if rule.keep:
        return replace(rule, target=f"{re.escape(target)}(?:{rule.target})")
    # a pattern with branches at its top level must not lose them to the prefix
    pattern = f"(?:{rule.source})" if source and "|" in rule.source else rule.source
    templates: str | tuple[str, ...] = rule.target
    if rule.target:
        templates = (
            escaped + rule.target if isinstance(rule.target, str) else tuple(escaped + text for text in rule.target)
        )
    return replace(rule, source=re.escape(source) + pattern, target=templates)


def _ops(value: object) -> tuple[Op, ...]:
    """Read what stands in ``op``: an op, its name, its dictionary, or several of them."""
    if isinstance(value, (Op, str, Mapping)):
        value = [value] if value else []
    if not isinstance(value, Iterable):
        raise _error(f"op {value!r} is not an op, a name or a list of them", 'such as op="transpose"')
    return tuple(_op(item) for item in value)


def _op(value: object) -> Op:
    if isinstance(value, Op):
        return value
    if isinstance(value, str):
        return Op(value)
    if isinstance(value, Mapping) and isinstance(value.get("name"), str):
        return Op.of(value["name"], **{key: item for key, item in value.items() if key != "name"})
    raise _error(f"op {value!r} has no name", 'such as {name = "split", dim = 0}')


def _frozen(value: object) -> object:
    if isinstance(value, Mapping):  # named sizes: {two = 2} is [["two", 2]]
        value = list(value.items())
    return tuple(_frozen(item) for item in value) if isinstance(value, (list, tuple)) else value


def _thawed(value: object) -> object:
    return [_thawed(item) for item in value] if isinstance(value, tuple) else value


def _error(message: str, hint: str) -> RemapError:
    return RemapError(message, code="remap_rules", hint=hint)
