"""Templates to files: plain text with ``$name`` fields, nothing more."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Any

from port_kit.errors import ScaffoldError
from port_kit.escape import escape_control_chars

TEMPLATES = Path(__file__).with_name("templates")
#: Of a line of what is written.
WIDTH = 120


def render(template: str, values: Mapping[str, str]) -> str:
    """Fill a template.

    Args:
        template: path under ``templates/`` without its suffix.
        values: every field of the template.

    Raises:
        KeyError: a field has no value.
    """
    text = (TEMPLATES / f"{template}.tmpl").read_text(encoding="utf-8")
    return Template(text).substitute(values)


def write_files(target: Path, files: Mapping[str, str]) -> list[Path]:
    """Write files under a new or empty folder.

    Raises:
        ScaffoldError: there is something in the folder, or it cannot be written.
    """
    try:
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise ScaffoldError(
                f"{target} exists and is not an empty folder",
                code="scaffold_target",
                hint="name another one with --output-dir; nothing is overwritten",
            )
        for name, text in files.items():
            place = target / name
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(text, encoding="utf-8")
            place.chmod(0o755 if place.suffix == ".sh" else 0o644)
    except OSError as error:
        raise ScaffoldError(
            f"{target} cannot be written: {error.strerror or error}", code="scaffold_target", hint="choose another"
        ) from error
    return [target / name for name in files]


def literal(value: Any, indent: int = 0) -> str:
    """Write plain data as Python, formatted as ruff leaves it: mappings one entry a line."""
    if isinstance(value, Mapping):
        return _block("{", [f"{literal(key)}: {literal(item, indent + 4)}" for key, item in value.items()], "}", indent)
    if isinstance(value, (list, tuple)):
        items = [literal(item, indent + 4) for item in value]
        opening, closing = ("[", "]") if isinstance(value, list) else ("(", ")")
        comma = "," if isinstance(value, tuple) and len(items) == 1 else ""
        line = f"{opening}{', '.join(items)}{comma}{closing}"
        return line if len(line) + indent < WIDTH - 40 and "\n" not in line else _block(opening, items, closing, indent)
    return escape_control_chars(json.dumps(value, ensure_ascii=False)) if isinstance(value, str) else repr(value)


def _block(opening: str, items: list[str], closing: str, indent: int) -> str:
    if not items:
        return opening + closing
    lines = "".join(f"{' ' * (indent + 4)}{item},\n" for item in items)
    return f"{opening}\n{lines}{' ' * indent}{closing}"


def camel(name: str) -> str:
    """``ltx_video`` to ``LtxVideo``."""
    return "".join(part.capitalize() for part in name.split("_"))
