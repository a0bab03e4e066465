"""Rule sets as text: TOML, or JSON of the same shape, from and to plain data."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from port_kit.remap.ops import rules_error

_HINT = "see port_kit.remap.rules for the form"


def read(source: str | Path) -> object:
    """Read TOML text, or a ``.toml`` or ``.json`` file.

    Raises:
        RemapError: ``remap_rules`` if it cannot be read.
    """
    try:
        text = source if isinstance(source, str) else source.read_text(encoding="utf-8")
        is_json = isinstance(source, Path) and source.suffix == ".json"
        return json.loads(text) if is_json else tomllib.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        name = source if isinstance(source, Path) else "TOML text"
        raise rules_error(f"{name} cannot be read: {error}", _HINT) from error


def dumps(data: Mapping[str, Any]) -> str:
    """Write the data of a rule set as TOML."""
    lines = [f"{key} = {_value(data[key])}" for key in ("name", "allow_downcast") if key in data]
    if "sizes" in data:
        lines += ["", "[sizes]", *(f"{name} = {_value(size)}" for name, size in data["sizes"].items())]
    for table in data["rule"]:
        lines += ["", "[[rule]]", *(f"{key} = {_value(_short(key, value))}" for key, value in table.items())]
    return "\n".join(lines) + "\n"


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
        raise rules_error(f"{value!r} has no form in TOML", _HINT)
    if isinstance(value, str) and "'" not in value and value.isprintable():
        return f"'{value}'"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007F")


def _name(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _value(key)
