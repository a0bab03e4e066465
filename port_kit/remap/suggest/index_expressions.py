"""Layer numbers as expressions: which arithmetic turns the numbers of a source name into those of its target."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from port_kit.remap.suggest.module_groups import Index

_LARGEST_PERIOD = 12


def index_expressions(pairs: Sequence[tuple[Index, Index]], captures: Mapping[int, int]) -> list[str] | None:
    r"""Template parts for every number of the target.

    Args:
        pairs: (target numbers, source numbers) of every instance.
        captures: position of a source number -> the capture of the pattern that holds it.

    Returns:
        One part per target number: ``\1``, ``{\1 // 4}``, ``{3 - \1}`` or a literal; None if no simple expression fits.
    """
    found: list[str] = []
    for axis in range(len(pairs[0][0])):
        wanted = [target[axis] for target, _ in pairs]
        columns = [([source[at] for _, source in pairs], capture) for at, capture in captures.items()]
        if len(set(wanted)) == 1:
            found.append(str(wanted[0]))
            continue
        preferred = sorted(columns, key=lambda column: column[0] != wanted)
        expression = next((text for values, capture in preferred for text in _fitting(values, wanted, capture)), None)
        if expression is None:
            return None
        found.append(expression)
    return found


def _fitting(values: Sequence[int], wanted: Sequence[int], capture: int) -> Iterator[str]:
    """Expressions of one capture that give the wanted numbers, simplest first."""
    if values == wanted:
        yield rf"\{capture}"
    shift = wanted[0] - values[0]
    if all(b == a + shift for a, b in zip(values, wanted, strict=True)):
        yield rf"{{\{capture} {_signed(shift)}}}"
    total = wanted[0] + values[0]
    if all(a + b == total for a, b in zip(values, wanted, strict=True)):
        yield rf"{{{total} - \{capture}}}"
    yield from _periodic(values, wanted, capture)


def _periodic(values: Sequence[int], wanted: Sequence[int], capture: int) -> Iterator[str]:
    """A flat list cut into pieces of one length: quotient or remainder of the number."""
    for period in range(2, _LARGEST_PERIOD + 1):
        for shift in sorted(range(-period, period + 1), key=abs):
            base = rf"\{capture}" if not shift else rf"(\{capture} {_signed(shift)})"
            if all(b == (a + shift) // period for a, b in zip(values, wanted, strict=True)):
                yield f"{{{base} // {period}}}"
            if all(b == (a + shift) % period for a, b in zip(values, wanted, strict=True)):
                yield f"{{{base} % {period}}}"


def _signed(number: int) -> str:
    return f"+ {number}" if number >= 0 else f"- {-number}"
