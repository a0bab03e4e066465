"""Layer templates of names: ``blocks.0.attn.q.weight`` to ``blocks.29.attn.q.weight`` as one line of a report."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Sequence

#: A number between dots, in its canonical form: ``007`` is not a layer number.
NUMBER = re.compile(r"(?<![^.])(?:0|[1-9][0-9]*)(?![^.])")


def template_of(name: str) -> str:
    """Return the layer template of a name: ``blocks.3.attn.0.weight`` -> ``blocks.#.attn.#.weight``."""
    return NUMBER.sub("#", name)


def split_numbers(name: str) -> tuple[str, tuple[int, ...]]:
    """Return ``("blocks.#.attn.#.weight", (3, 0))`` for ``blocks.3.attn.0.weight``."""
    return template_of(name), tuple(map(int, NUMBER.findall(name)))


def ranges(numbers: Iterable[int]) -> str:
    """Return ``0..2,5`` for ``{0, 1, 2, 5}``."""
    parts = []
    for _, run in itertools.groupby(enumerate(sorted(set(numbers))), lambda item: item[1] - item[0]):
        first, *rest = [number for _, number in run]
        parts.append(f"{first}..{rest[-1]}" if rest else str(first))
    return ",".join(parts)


def parse_ranges(text: str) -> list[int]:
    """Invert :func:`ranges`."""
    numbers: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("..")
        numbers += range(int(first), int(last or first) + 1)
    return numbers


def fill(template: str, fillings: Iterable[object]) -> str:
    """Replace each ``#`` of a template."""
    pieces = template.split("#")
    return pieces[0] + "".join(str(value) + piece for value, piece in zip(fillings, pieces[1:], strict=True))


def collapse(names: Iterable[str]) -> list[str]:
    """Write names as templates with ranges: ``blocks.{0..29}.attn.q.weight``; others stay as they are."""
    groups: dict[str, list[tuple[int, ...]]] = {}
    for name in names:
        template, numbers = split_numbers(name)
        groups.setdefault(template, []).append(numbers)
    lines: list[str] = []
    for template, rows in groups.items():
        axes = product_axes(rows)
        lines += [fill(template, row) for row in rows] if axes is None else [fill(template, map(axis_text, axes))]
    return lines


def axis_text(axis: Sequence[int]) -> str:
    """Return one number, or ``{0..29}``."""
    return str(axis[0]) if len(axis) == 1 else "{" + ranges(axis) + "}"


def product_axes(rows: Sequence[tuple[int, ...]]) -> list[list[int]] | None:
    """Return the axes whose product the rows are, or None if they are no product."""
    axes = [sorted(set(column)) for column in zip(*rows, strict=True)]
    return axes if math.prod(map(len, axes)) == len(set(rows)) == len(rows) else None


def expand(template: str, axes: Sequence[Sequence[int]]) -> list[str]:
    """Return all names of a template."""
    return [fill(template, row) for row in itertools.product(*axes)]
