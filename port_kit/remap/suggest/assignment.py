"""Maximum-weight one-to-one assignment (the Hungarian method with potentials), without numpy."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

S = TypeVar("S", bound=Hashable)
T = TypeVar("T", bound=Hashable)

_NONE = 0.0  # score of a pair that is not allowed: as much as leaving both unassigned


def best_assignment(scores: Mapping[tuple[S, T], float]) -> dict[T, S]:
    """Assign targets to sources so that the sum of scores is greatest.

    Pairs that are not in ``scores`` are not assigned. The connected components of the problem are solved one by one;
    they are small, because only tensors of equal size compete.

    Args:
        scores: (source, target) -> score, positive if the pair is better than none.

    Returns:
        target -> source for every assigned target.
    """
    assigned: dict[T, S] = {}
    for rows, columns in _components(scores):
        matrix = [[scores.get((row, column), _NONE) for column in columns] for row in rows]
        for row, column in _solve(matrix):
            if matrix[row][column] > 0:
                assigned[columns[column]] = rows[row]
    return assigned


def _components(pairs: Iterable[tuple[S, T]]) -> Iterator[tuple[list[S], list[T]]]:
    """Yield the rows and columns of every connected component."""
    columns_of: dict[S, list[T]] = defaultdict(list)
    rows_of: dict[T, list[S]] = defaultdict(list)
    for row, column in pairs:
        columns_of[row].append(column)
        rows_of[column].append(row)
    while columns_of:
        rows: dict[S, None] = dict.fromkeys([next(iter(columns_of))])
        columns: list[T] = []
        pending = list(rows)
        while pending:
            reached = [column for column in columns_of.pop(pending.pop()) if column in rows_of]
            columns += reached
            found = [row for column in reached for row in rows_of.pop(column)]
            pending += [row for row in dict.fromkeys(found) if row not in rows]
            rows |= dict.fromkeys(found)
        yield list(rows), columns


def _solve(scores: Sequence[Sequence[float]]) -> list[tuple[int, int]]:
    """Pairs (row, column) of the best assignment of a dense matrix of scores."""
    flipped = len(scores) > len(scores[0])
    costs = [[-value for value in row] for row in (zip(*scores, strict=True) if flipped else scores)]
    pairs = _shortest_augmenting_paths(costs)
    return [(column, row) for row, column in pairs] if flipped else pairs


def _shortest_augmenting_paths(costs: list[list[float]]) -> list[tuple[int, int]]:
    """Minimum-cost assignment of all rows (not more than columns); O(rows^2 * columns)."""
    rows, columns = len(costs), len(costs[0])
    row_potential, column_potential = [0.0] * (rows + 1), [0.0] * (columns + 1)
    owner = [0] * (columns + 1)  # row (from 1) that holds a column; column 0 is the row being placed
    for row in range(1, rows + 1):
        owner[0] = row
        _augment(costs, owner, row_potential, column_potential)
    return [(owner[column] - 1, column - 1) for column in range(1, columns + 1) if owner[column]]


def _augment(
    costs: list[list[float]], owner: list[int], row_potential: list[float], column_potential: list[float]
) -> None:
    """Place the row in ``owner[0]`` along the cheapest alternating path."""
    columns = len(owner) - 1
    reduced, previous, used = [float("inf")] * (columns + 1), [0] * (columns + 1), [False] * (columns + 1)
    current = 0
    while True:
        used[current] = True
        row, delta, following = owner[current], float("inf"), 0
        line, base = costs[row - 1], row_potential[row]
        for column in range(1, columns + 1):
            if used[column]:
                continue
            value = line[column - 1] - base - column_potential[column]
            if value < reduced[column]:
                reduced[column], previous[column] = value, current
            if reduced[column] < delta:
                delta, following = reduced[column], column
        for column in range(columns + 1):
            if used[column]:
                row_potential[owner[column]] += delta
                column_potential[column] -= delta
            else:
                reduced[column] -= delta
        current = following
        if not owner[current]:
            break
    while current:
        owner[current] = owner[previous[current]]
        current = previous[current]
