"""Rule sets as files: TOML (or JSON of the same shape) to rules and back, and rules as Python source.

A file may build on others::

    name = "my_model"
    extends = "base.toml"              # rules here replace the base's rules for the same source pattern
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
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from port_kit.errors import RemapError
from port_kit.remap.rules import Op, Rule, RuleSet

_FIELDS = {"name", "narrow", "sizes", "rule", "extends", "include"}
#: Files that build on files that build on files: deeper than this is a circle.
MAX_DEPTH = 8


def load(path: Path, *, depth: int = 0) -> RuleSet:
    """Read a file of rules.

    Raises:
        RemapError: ``remap_rules`` where it cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise _error(f"{path} cannot be read: {error}") from error
    if path.suffix == ".json":
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise _error(f"{path} is not JSON: {error}") from error
        return _build(data, path.parent, depth)
    return loads(text, folder=path.parent, depth=depth)


def loads(text: str, *, folder: Path | None = None, depth: int = 0) -> RuleSet:
    """Read rules from TOML text; files that it names are relative to ``folder``."""
    try:
        data = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise _error(f"not TOML: {error}") from error
    return _build(data, folder, depth)


def _build(data: object, folder: Path | None, depth: int) -> RuleSet:
    if not isinstance(data, Mapping) or set(data) - _FIELDS:
        unknown = sorted(set(data) - _FIELDS) if isinstance(data, Mapping) else type(data).__name__
        raise _error(f"unknown fields in a rule set: {unknown}", f"fields: {', '.join(sorted(_FIELDS))}")
    tables, sizes = data.get("rule", []), data.get("sizes", {})
    if not isinstance(tables, list) or not all(isinstance(table, Mapping) for table in tables):
        raise _error("rule is not a list of tables", "write [[rule]] before each rule")
    if not isinstance(sizes, Mapping) or not all(type(value) in (int, str) for value in sizes.values()):
        raise _error("sizes is not a table of numbers and expressions")
    name, included, narrow = data.get("name", ""), data.get("include", []), data.get("narrow")
    if not isinstance(name, str) or not isinstance(included, list) or type(narrow) not in (bool, type(None)):
        raise _error("name is a text, include a list of tables, narrow true or false")
    rules = [Rule.from_dict(table) for table in tables]
    if "extends" in data:
        made = _inherit(_named(data["extends"], folder, depth), rules, name, dict(sizes))
    else:
        made = RuleSet(name or "rules", tuple(rules), dict(sizes))
    for part in included:
        made = made.extend(_included(part, folder, depth).rules)
    return RuleSet(made.name, made.rules, made.sizes, made.narrow if narrow is None else narrow)


def _inherit(base: RuleSet, rules: list[Rule], name: str, sizes: dict[str, int | str]) -> RuleSet:
    """Rules for a source pattern of the base replace it; others are new."""
    known = {rule.source for rule in base if rule.source}
    replacing = [rule for rule in rules if rule.source in known]
    new = [rule for rule in rules if rule.source not in known]
    return base.override(replacing, name=name, **sizes).extend(new)


def _included(part: object, folder: Path | None, depth: int) -> RuleSet:
    if not isinstance(part, Mapping) or "rules" not in part or set(part) - {"rules", "source", "target"}:
        raise _error("an include needs rules, and may have source and target prefixes")
    if not all(isinstance(value, str) for value in part.values()):
        raise _error(f"an include has {dict(part)}", "rules, source and target are texts")
    return _named(part["rules"], folder, depth).under(str(part.get("source", "")), str(part.get("target", "")))


def _named(reference: object, folder: Path | None, depth: int) -> RuleSet:
    if depth >= MAX_DEPTH:
        raise _error(f"rule sets build on each other more than {MAX_DEPTH} deep", "look for a circle")
    text = str(reference)
    if text.endswith((".toml", ".json")):
        return load((folder or Path()) / text, depth=depth + 1)
    return imported(text)


def imported(reference: str) -> RuleSet:
    """The rule set that ``module:ATTRIBUTE`` names.

    Raises:
        RemapError: ``remap_rules`` where there is none.
    """
    from port_kit.port import resolve

    hint = "name a .toml or .json file, or module:ATTRIBUTE of a RuleSet"
    if not re.fullmatch(r"\w[\w.]*:\w+", reference):
        raise _error(f"{reference!r} is neither a file of rules nor module:ATTRIBUTE", hint)
    try:
        found = resolve(reference)
    except (ImportError, AttributeError, ValueError) as error:
        raise _error(f"{reference} cannot be imported: {error}", hint) from error
    if not isinstance(found, RuleSet):
        raise _error(f"{reference} is a {type(found).__name__}, not a RuleSet", hint)
    return found


# -- writing -------------------------------------------------------------------------------------------------------


def dumps(rules: RuleSet) -> str:
    """Write a rule set as TOML."""
    data = rules.to_dict()
    lines = [f"name = {_value(data['name'])}"]
    if rules.narrow:
        lines.append("narrow = true")
    if rules.sizes:
        lines += ["", "[sizes]", *(f"{name} = {_value(size)}" for name, size in rules.sizes.items())]
    for table in data["rule"]:
        lines += ["", "[[rule]]", *(f"{key} = {_value(_short(key, value))}" for key, value in table.items())]
    return "\n".join(lines) + "\n"


def _short(key: str, value: Any) -> Any:
    """One op stands alone, one without arguments as its name."""
    if key == "op" and len(value) == 1:
        return value[0]["name"] if len(value[0]) == 1 else value[0]
    return value


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, str):
        return _string(value)
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{_key(key)} = {_value(item)}" for key, item in value.items()) + " }"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_value(item) for item in value) + "]"
    raise _error(f"{value!r} has no form in TOML")


def _string(text: str) -> str:
    """A literal string where that is possible, because patterns are full of backslashes."""
    if "'" not in text and text.isprintable():
        return f"'{text}'"
    return json.dumps(text, ensure_ascii=True).replace("\\u007f", "\\u007F")


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _string(key)


def to_python(rules: RuleSet) -> str:
    """Write a rule set as Python source."""
    lines = [
        "from port_kit.remap import Op, Rule, RuleSet",
        "",
        "RULES = RuleSet(",
        f"    name={rules.name!r},",
        "    rules=(",
        *(f"        {_python_rule(rule)}," for rule in rules),
        "    ),",
    ]
    if rules.sizes:
        lines.append(f"    sizes={dict(rules.sizes)!r},")
    if rules.narrow:
        lines.append("    narrow=True,")
    return "\n".join([*lines, ")", ""])


def _python_rule(rule: Rule) -> str:
    parts = []
    for field in rule.__dataclass_fields__.values():
        value = getattr(rule, field.name)
        if value == field.default:
            continue
        if field.name == "op":
            ops = [_python_op(op) for op in value]
            text = ops[0] if len(ops) == 1 else "(" + ", ".join(ops) + ")"
        else:
            text = _python_value(value)
        parts.append(f"{field.name}={text}")
    return f"Rule({', '.join(parts)})"


def _python_value(value: object) -> str:
    if isinstance(value, tuple):
        return "(" + "".join(f"{_python_value(item)}, " for item in value).rstrip() + ")"
    if isinstance(value, str) and "\\" in value and '"' not in value and not value.endswith("\\"):
        return f'r"{value}"' if value.isprintable() else repr(value)
    return repr(value)


def _python_op(op: Op) -> str:
    arguments = "".join(f", {key}={_python_value(value)}" for key, value in op.args)
    return f"Op.of({op.name!r}{arguments})"


def _error(message: str, hint: str = "see port_kit.remap.toml for the form") -> RemapError:
    return RemapError(message, code="remap_rules", hint=hint)
