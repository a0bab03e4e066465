"""Files of prompts: one JSON object a line, with the options of one request by their names."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from port_kit.clips.loras import LORA, LORA_SCALE, check_loras, takes_loras
from port_kit.clips.options import check_first_frame, option_types, reference_names
from port_kit.errors import InputError
from port_kit.escape import quoted, reason_of
from port_kit.files import read_text
from port_kit.port import Port

_ENCODING = "utf-8-sig"  # editors of some systems write a byte order mark


@dataclass(frozen=True)
class Line:
    """One request of a file.

    Attributes:
        number: of the line, from 1.
        request: its options by name.
        references: its references by kind.
    """

    number: int
    request: Mapping[str, Any]
    references: Mapping[str, Sequence[Any]]


def read_prompts(
    path: Path, port: Port, defaults: Mapping[str, Any], references: Mapping[str, Sequence[Any]]
) -> list[Line]:
    """Read a file of prompts, and check the names and types of all lines; empty lines are left out.

    Args:
        path: the file; paths of references in it are relative to its folder.
        port: the port.
        defaults: options of all lines that do not set them.
        references: references of all lines that have none of their kind.

    Raises:
        InputError: ``source_missing``, or ``prompts_file`` with all lines that are no requests of the port.
    """
    try:
        rows = read_text(path, _ENCODING).split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path} cannot be read: {reason_of(error)}",
            code="source_missing",
            hint="give a file of JSON objects, one a line",
        ) from error
    lines, problems = [], []
    for number, row in enumerate(rows, 1):
        if not row.strip():
            continue
        try:
            line = _line(number, row, path.parent, port)
            line = Line(number, {**defaults, **line.request}, {**references, **line.references})
            if not str(line.request.get("prompt") or "").strip():
                raise InputError("no prompt", hint="set prompt")
            check_first_frame(port, line.request, line.references)
            check_loras(line.request, line.references)
            lines.append(line)
        except InputError as error:
            problems.append(f"line {number}: {error.message}" + (f"; {error.hint}" if error.hint else ""))
    if not lines and not problems:
        problems.append("no line has a request")
    if problems:
        raise InputError(
            "\n".join([f"{path} has lines that are no requests:", *problems]),
            code="prompts_file",
            hint='each line is a JSON object, such as {"prompt": "rain on a roof", "seed": 1}',
            problems=problems,
        )
    return lines


def _line(number: int, row: str, folder: Path, port: Port) -> Line:
    try:
        fields = json.loads(row, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise InputError(f"no JSON: {reason_of(error)}") from error
    if not isinstance(fields, dict):
        raise InputError(f"{type(fields).__name__}; expected a JSON object")
    types, names = option_types(port), reference_names(port)
    if takes_loras(port):
        names[LORA] = LORA
    request: dict[str, Any] = {}
    references: dict[str, Sequence[Any]] = {}
    for name, value in fields.items():
        if name in names:
            if names[name] in references:
                raise InputError(f"{name} and another field name the same references")
            references[names[name]] = list(_paths(name, value, folder))
        elif name in types:
            _check_type(name, value, types[name])
            request[name] = value
        elif name == LORA_SCALE and takes_loras(port):
            request[name] = value if isinstance(value, list) else [value]
            for scale in request[name]:
                _check_type(name, scale, float)
        else:
            raise _unknown(name, [*types, *names])
    return Line(number, request, references)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{quoted(twice[0])} occurs twice")
    return dict(pairs)


def _unknown(name: str, known: list[str]) -> InputError:
    near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.6)
    hint = f"did you mean {quoted(near[0])}?" if near else f"use {', '.join(sorted(known))}"
    return InputError(f"unknown option {quoted(name)}", hint=hint)


def _check_type(name: str, value: object, kind: type) -> None:
    accepted = (int, float) if kind is float else (kind,)
    if isinstance(value, bool) or not isinstance(value, accepted):
        raise InputError(f"{name} is {quoted(value)}; expected {kind.__name__}")


def _paths(name: str, value: object, folder: Path) -> Iterator[Path]:
    items = value if isinstance(value, list) else [value]
    for item in items:
        found = folder / item if isinstance(item, str) else None
        if found is None or not (found.exists() if name == LORA else found.is_file()):
            raise InputError(f"{name} is {quoted(item)}; expected the path of a file, relative to {folder}")
        yield found
