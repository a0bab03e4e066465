"""Names by layer template: ``blocks.0.attn.q.weight`` to ``blocks.29.attn.q.weight`` as one line of a report."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Container, Iterable, Sequence

#: A number that stands alone between dots.
NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
#: Stand-ins for a layer number, to see where it goes in a target.
PROBES = ("7340033", "104395301")


def split_numbers(name: str) -> tuple[str, tuple[int, ...]]:
    """``blocks.3.attn.0.weight`` -> ``("blocks.#.attn.#.weight", (3, 0))``."""
    return NUMBER.sub("#", name), tuple(map(int, NUMBER.findall(name)))


def section(name: str, literal: Container[str]) -> tuple[str, str] | None:
    """What stands before the first layer number of a name, and that number; None where the name has none.

    Args:
        name: a name; its last part is never a layer number.
        literal: the numbers that patterns spell out.
    """
    at = 0
    for part in name.split(".")[:-1]:
        if part.isdecimal() and part not in literal:
            return name[:at], part
        at += len(part) + 1
    return None


def ranges(numbers: Iterable[int]) -> str:
    """``{0, 1, 2, 5}`` -> ``0..2,5``."""
    parts: list[str] = []
    ordered = sorted(set(numbers))
    start = 0
    for at, number in enumerate(ordered):
        if at + 1 == len(ordered) or ordered[at + 1] != number + 1:
            first = ordered[start]
            parts.append(str(first) if first == number else f"{first}..{number}")
            start = at + 1
    return ",".join(parts)


def parse_ranges(text: str) -> list[int]:
    """The inverse of :func:`ranges`."""
    numbers: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("..")
        numbers += range(int(first), int(last or first) + 1)
    return numbers


def fill(template: str, fillings: Sequence[object]) -> str:
    """Put one filling in the place of each ``#``."""
    pieces = template.split("#")
    return pieces[0] + "".join(str(value) + piece for value, piece in zip(fillings, pieces[1:], strict=True))


def collapse(names: Iterable[str]) -> list[str]:
    """Write names as templates with ranges: ``blocks.{0..29}.attn.q.weight``; what does not fit stays as it is."""
    groups: dict[str, list[tuple[int, ...]]] = {}
    for name in names:
        template, numbers = split_numbers(name)
        groups.setdefault(template, []).append(numbers)
    lines: list[str] = []
    for template, rows in groups.items():
        axes = product_axes(rows)
        if axes is None:
            lines += [fill(template, row) for row in rows]
        else:
            lines.append(fill(template, [axis_text(axis) for axis in axes]))
    return lines


def axis_text(axis: Sequence[int]) -> str:
    """One number, or ``{0..29}``."""
    return str(axis[0]) if len(axis) == 1 else "{" + ranges(axis) + "}"


def product_axes(rows: Sequence[tuple[int, ...]]) -> list[list[int]] | None:
    """The axes whose product the rows are, or None where they are no product."""
    axes = [sorted(set(column)) for column in zip(*rows, strict=True)]
    if math.prod(map(len, axes)) != len(set(rows)) or len(set(rows)) != len(rows):
        return None
    return axes


def expand(template: str, axes: Sequence[Sequence[int]]) -> list[str]:
    """All names of a template."""
    return [fill(template, row) for row in itertools.product(*axes)]
