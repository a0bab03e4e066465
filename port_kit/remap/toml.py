"""Rule sets as text: TOML, or JSON of the same shape, from and to plain data."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from port_kit.errors import RemapError

_HINT = "see port_kit.remap.rules for the form"


def load(path: Path) -> object:
    """Read a ``.toml`` or ``.json`` file.

    Raises:
        RemapError: ``remap_rules`` if it cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
        return json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise RemapError(f"{path} cannot be read: {error}", code="remap_rules", hint=_HINT) from error


def loads(text: str) -> dict[str, Any]:
    """Parse TOML.

    Raises:
        RemapError: ``remap_rules`` if it is none.
    """
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise RemapError(f"not TOML: {error}", code="remap_rules", hint=_HINT) from error


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
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, str):
        return _string(value)
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{_name(key)} = {_value(item)}" for key, item in value.items()) + " }"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_value, value)) + "]"
    raise RemapError(f"{value!r} has no form in TOML", code="remap_rules", hint=_HINT)


def _string(text: str) -> str:
    """Write a literal string if possible, because patterns are full of backslashes."""
    if "'" not in text and text.isprintable():
        return f"'{text}'"
    return json.dumps(text, ensure_ascii=True).replace("\\u007f", "\\u007F")


def _name(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _string(key)
