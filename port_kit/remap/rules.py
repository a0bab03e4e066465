"""Rule sets: composition of rules, their TOML and JSON form, and their compilation.

A file may build on others::

    name = "my_model"
    extends = "base.toml"              # rules here replace the base's rules with the same source pattern
    [sizes]
    hidden = 3072
    mlp = "4*hidden"
    [[include]]                        # another set under prefixes
    rules = "vae.toml"
    source = "first_stage_model."
    target = "vae."
    [[rule]]
    source = 'blocks\\.(\\d+)\\.attn\\.(q|k|v)\\.weight'
    target = 'layers.\\1.attn.qkv.weight'
    shard = '\\2'
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from port_kit.escape import quoted, reason_of
from port_kit.files import read_text
from port_kit.manifest import Manifest
from port_kit.remap.ops import Op, rules_error
from port_kit.remap.patterns import literal_template
from port_kit.remap.plan import Plan, check
from port_kit.remap.problems import raise_problems
from port_kit.remap.rule import Rule, Rules, Sizes

__all__ = ["Op", "Rule", "RuleSet", "import_rules"]

_FIELDS = {"name", "allow_downcast", "sizes", "rule", "extends", "include"}
#: Deepest nesting of files that extend or include each other; deeper is a cycle.
MAX_DEPTH = 8
_FORM = "see port_kit.remap.rules for the form"


@dataclass(frozen=True)
class RuleSet(Rules):
    """An ordered set of rules with its named sizes; see :class:`~port_kit.remap.rule.Rules` for the attributes."""

    def extend(self, rules: Iterable[Rule], *, name: str = "", **sizes: int | str) -> RuleSet:
        """Return this set with more rules; none is replaced."""
        return replace(self, name=name or self.name, rules=(*self.rules, *rules), sizes={**self.sizes, **sizes})

    def override(self, rules: Iterable[Rule], *, name: str = "", **sizes: int | str) -> RuleSet:
        """Return a set in which each given rule replaces the rules with its source pattern (``keep``: target pattern).

        Raises:
            RemapError: ``remap_rules`` if a rule overrides no other rule.
        """
        rules = tuple(rules)
        keys = {_key(rule) for rule in rules}
        known = {_key(rule) for rule in self.rules}
        unmatched = [rule.label for rule in rules if _key(rule) not in known]
        if unmatched:
            raise rules_error(f"{', '.join(unmatched)} overrides nothing in {self.name}", "use extend for new rules")
        remaining = [rule for rule in self.rules if _key(rule) not in keys]
        return replace(self, name=name or self.name, rules=(*rules, *remaining), sizes={**self.sizes, **sizes})

    def under(self, source: str = "", target: str = "", *, name: str = "") -> RuleSet:
        """Return this set with all names under a prefix: ``rules.under("text_model.", "text_encoder.")``."""
        prefixed = tuple(_prefixed(rule, source, target) for rule in self.rules)
        return replace(self, name=name or self.name, rules=prefixed)

    def __or__(self, other: RuleSet) -> RuleSet:
        """Join two sets; a size with two values is an error."""
        clash = [size for size in self.sizes if other.sizes.get(size, self.sizes[size]) != self.sizes[size]]
        if clash:
            raise rules_error(f"{self.name} and {other.name} differ in the sizes {clash}", "rename one of them")
        joined = self.extend(other.rules, name=f"{self.name}+{other.name}", **other.sizes)
        return replace(joined, allow_downcast=self.allow_downcast or other.allow_downcast)

    def to_dict(self) -> dict[str, Any]:
        """Return the form in TOML and JSON."""
        options = {"allow_downcast": self.allow_downcast, "sizes": dict(self.sizes)}
        given = {key: value for key, value in options.items() if value}
        return {"name": self.name, **given, "rule": [rule.to_dict() for rule in self.rules]}

    @classmethod
    def from_dict(cls, data: object, *, folder: Path | None = None, depth: int = 0) -> RuleSet:
        """Read the form of TOML and JSON; files that it refers to are relative to ``folder``.

        Raises:
            RemapError: ``remap_rules`` for anything else.
        """
        fields = _checked_fields(data)
        name, sizes = fields.get("name", ""), dict(fields.get("sizes", {}))
        rules = [Rule.from_dict(table) for table in fields.get("rule", [])]
        if "extends" in fields:
            base = cls._referenced(fields["extends"], folder, depth)
            known = {rule.source for rule in base if rule.source}
            made = base.override([rule for rule in rules if rule.source in known], name=name, **sizes)
            made = made.extend([rule for rule in rules if rule.source not in known])
        else:
            made = cls(name or "rules", tuple(rules), sizes)
        for part in fields.get("include", []):
            made = made.extend(cls._included(part, folder, depth).rules)
        return replace(made, allow_downcast=fields.get("allow_downcast", made.allow_downcast))

    @classmethod
    def _included(cls, part: object, folder: Path | None, depth: int) -> RuleSet:
        known = isinstance(part, Mapping) and {"rules"} <= set(part) <= {"rules", "source", "target"}
        if not isinstance(part, Mapping) or not known or not all(isinstance(text, str) for text in part.values()):
            raise rules_error(
                f"include is {quoted(part)}", "it needs rules, and may have source and target prefixes: texts"
            )
        found = cls._referenced(part["rules"], folder, depth)
        return found.under(part.get("source", ""), part.get("target", ""))

    @classmethod
    def _referenced(cls, reference: object, folder: Path | None, depth: int) -> RuleSet:
        if depth >= MAX_DEPTH:
            raise rules_error(f"rule sets refer to each other more than {MAX_DEPTH} deep", "look for a cycle")
        text = str(reference)
        if text.endswith((".toml", ".json")):
            return cls.from_file((folder or Path()) / text, depth=depth + 1)
        return import_rules(text)

    def to_toml(self) -> str:
        """Return the set as TOML; :meth:`from_toml` reads the same set back."""
        data = self.to_dict()
        lines = [f"{key} = {_value(data[key])}" for key in ("name", "allow_downcast") if key in data]
        if "sizes" in data:
            lines += ["", "[sizes]", *(f"{name} = {_value(size)}" for name, size in data["sizes"].items())]
        for table in data["rule"]:
            lines += ["", "[[rule]]", *(f"{key} = {_value(_short(key, value))}" for key, value in table.items())]
        return "\n".join(lines) + "\n"

    @classmethod
    def from_toml(cls, text: str, *, folder: Path | None = None) -> RuleSet:
        """Read TOML; ``extends`` and ``[[include]]`` name files relative to ``folder`` or ``module:ATTRIBUTE``."""
        return cls.from_dict(_read_text(text), folder=folder)

    @classmethod
    def from_file(cls, path: str | Path, *, allow_downcast: bool = False, depth: int = 0) -> RuleSet:
        """Read a ``.toml`` or ``.json`` file of rules; ``allow_downcast`` permits what the file does not."""
        rules = cls.from_dict(_read_text(Path(path)), folder=Path(path).parent, depth=depth)
        return replace(rules, allow_downcast=rules.allow_downcast or allow_downcast)

    def compile(
        self, source: Manifest, target: Manifest, sizes: Sizes | None = None, *, allow_downcast: bool = False
    ) -> Plan:
        """Compile against two manifests; arguments as for :func:`port_kit.remap.plan.check`.

        Raises:
            RemapError: with every gap in ``details["problems"]``; the code is theirs, or ``remap_failed`` for several.
        """
        plan = check(self, source, target, sizes, allow_downcast=allow_downcast)
        raise_problems(plan.explained(), f"{self.name} does not map {source.origin or 'the source'} completely")
        return plan


def import_rules(reference: str) -> RuleSet:
    """Return the rule set at ``module:ATTRIBUTE``.

    Raises:
        RemapError: ``remap_rules`` if there is none.
    """
    from port_kit.port import resolve

    hint = "name a .toml or .json file, or module:ATTRIBUTE of a RuleSet"
    if not re.fullmatch(r"\w[\w.]*:\w+", reference):
        raise rules_error(f"{quoted(reference)} is neither a file of rules nor module:ATTRIBUTE", hint)
    try:
        found = resolve(reference)
    except (ImportError, AttributeError, ValueError) as error:
        raise rules_error(f"{reference} cannot be imported: {reason_of(error)}", hint) from error
    if not isinstance(found, RuleSet):
        raise rules_error(f"{reference} is a {type(found).__name__}, not a RuleSet", hint)
    return found


def _checked_fields(data: object) -> Mapping[str, Any]:
    if not isinstance(data, Mapping) or set(data) - _FIELDS:
        unknown = sorted(set(data) - _FIELDS) if isinstance(data, Mapping) else type(data).__name__
        raise rules_error(f"unknown fields in a rule set: {unknown}", f"fields: {', '.join(sorted(_FIELDS))}")
    tables, sizes = data.get("rule", []), data.get("sizes", {})
    if not isinstance(tables, list) or not all(isinstance(table, Mapping) for table in tables):
        raise rules_error("rule is not a list of tables", "write [[rule]] before each rule")
    if not isinstance(sizes, Mapping) or not all(type(value) in (int, str) for value in sizes.values()):
        raise rules_error("sizes is not a table of numbers and expressions", "such as hidden = 3072")
    types = {"name": str, "include": list, "allow_downcast": bool}
    for field, kind in types.items():
        if field in data and not isinstance(data[field], kind):
            raise rules_error(f"{field} is {quoted(data[field])}", f"it must be a {kind.__name__}")
    return data


def _key(rule: Rule) -> tuple[str, str]:
    return (rule.source, "") if rule.source else ("", str(rule.target))


def _prefixed(rule: Rule, source: str, target: str) -> Rule:
    escaped = literal_template(target)
    if rule.keep:
        return replace(rule, target=f"{re.escape(target)}(?:{rule.target})")
    # a pattern with alternatives at its top level must not lose them to the prefix
    pattern = f"(?:{rule.source})" if source and "|" in rule.source else rule.source
    templates = rule.target
    if templates:
        templates = escaped + templates if isinstance(templates, str) else tuple(escaped + text for text in templates)
    return replace(rule, source=re.escape(source) + pattern, target=templates)


def _read_text(source: str | Path) -> object:
    """Read TOML text, or a ``.toml`` or ``.json`` file; raises ``remap_rules`` if it cannot be read."""
    try:
        text = source if isinstance(source, str) else read_text(source)
        is_json = isinstance(source, Path) and source.suffix == ".json"
        return json.loads(text) if is_json else tomllib.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        name = source if isinstance(source, Path) else "TOML text"
        raise rules_error(f"{name} cannot be read: {reason_of(error)}", _FORM) from error


def _short(key: str, value: Any) -> Any:
    """Write a single op without a list, and one without arguments as its name."""
    if key == "op" and len(value) == 1:
        return value[0]["name"] if len(value[0]) == 1 else value[0]
    return value


def _value(value: Any) -> str:
    """Write a value; texts are literal strings if possible, because patterns are full of backslashes."""
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{_name(key)} = {_value(item)}" for key, item in value.items()) + " }"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_value, value)) + "]"
    if not isinstance(value, (int, str)):
        raise rules_error(f"{quoted(value)} has no form in TOML", _FORM)
    if isinstance(value, str) and "'" not in value and value.isprintable():
        return f"'{value}'"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007F")


def _name(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _value(key)
