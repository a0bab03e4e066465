"""Maximum-weight one-to-one assignment (the Hungarian method with potentials), without numpy."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

S = TypeVar("S", bound=Hashable)
T = TypeVar("T", bound=Hashable)

_NONE = 0.0  # what a pair counts that never meets: as much as leaving both alone


def best_assignment(scores: Mapping[tuple[S, T], float]) -> dict[T, S]:
    """Assign targets to sources so that the sum of scores is greatest.

    Pairs that are not in ``scores`` never meet. The problem falls apart into connected components, which are small
    because only tensors of equal size compete.

    Args:
        scores: (source, target) -> score, positive where the pair is better than none.

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


def _components(scores: Mapping[tuple[S, T], float]) -> list[tuple[list[S], list[T]]]:
    neighbours: dict[tuple[str, Hashable], list[tuple[str, Hashable]]] = defaultdict(list)
    for source, target in scores:
        neighbours[("s", source)].append(("t", target))
        neighbours[("t", target)].append(("s", source))
    seen: set[tuple[str, Hashable]] = set()
    found: list[tuple[list[S], list[T]]] = []
    for start in neighbours:
        if start in seen:
            continue
        seen.add(start)
        members, frontier = [start], [start]
        while frontier:
            for node in neighbours[frontier.pop()]:
                if node not in seen:
                    seen.add(node)
                    members.append(node)
                    frontier.append(node)
        rows = [node for side, node in members if side == "s"]
        columns = [node for side, node in members if side == "t"]
        found.append((rows, columns))  # type: ignore[arg-type]
    return found


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
