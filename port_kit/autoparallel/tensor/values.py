"""Numbers that the code between linears uses, and that a rank must divide: found by trials.

Attributes that the block reads while it runs are recorded. If the trial of a rank fails, the smallest set of attributes
is searched whose division makes it succeed: first those of the failing group's own modules.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import nn

from port_kit.autoparallel.tensor.blocks import Arguments, copy_arguments
from port_kit.autoparallel.tensor.divided import Place, places, with_divided
from port_kit.autoparallel.tensor.groups import Groups
from port_kit.autoparallel.tensor.sizes import is_number, is_plain_object
from port_kit.autoparallel.tensor.trial import Failure, Recording, record, try_rank

#: Trials per group before the search ends.
MAX_TRIALS = 1500
#: Attributes that are divided together at most.
MAX_TOGETHER = 4
#: Attributes of torch's modules that describe weights and that no forward uses.
_DESCRIPTIVE = ("in_features", "out_features", "in_channels", "out_channels")


@dataclass(frozen=True)
class Number:
    """A whole number, or one entry of a tuple, that the block's code reads.

    Attributes:
        module: path of the module in the block.
        attribute: name, with a dot if the owner is an object of the module, such as ``processor.heads``.
        place: entry of nested tuples or lists; empty for a plain number.
        value: what was read.
    """

    module: str
    attribute: str
    place: Place
    value: int

    def owner(self, block: nn.Module) -> tuple[Any, str]:
        """Return the object that holds the attribute, and the attribute's own name."""
        owner: Any = block.get_submodule(self.module)
        *inner, name = self.attribute.split(".")
        for each in inner:
            owner = getattr(owner, each)
        return owner, name


def find_values(
    block: nn.Module, given: Arguments, groups: Groups, *, ranks: int = 2
) -> tuple[tuple[Number, ...], Failure | None]:
    """Return the numbers to divide, and the failure that remains without a set of numbers that removes it."""
    recording = record(block, given, groups)
    candidates = read_numbers(block, given)
    chosen: tuple[Number, ...] = ()
    failure = run_trials(block, given, groups, recording, chosen, ranks)
    while failure is not None:
        better = _search(block, given, groups, recording, chosen, candidates, failure, ranks)
        if better is None:
            return chosen, failure
        chosen, failure = better
    return chosen, None


def run_trials(
    block: nn.Module, given: Arguments, groups: Groups, recording: Recording, chosen: Sequence[Number], ranks: int
) -> Failure | None:
    """Try the first and the last rank; return the first failure."""
    for rank in (0, ranks - 1):
        values = divided_values(block, chosen, ranks)
        failure = try_rank(block, given, groups, recording, rank=rank, ranks=ranks, values=values)
        if failure is not None:
            return failure
    return None


def divided_values(block: nn.Module, chosen: Sequence[Number], ranks: int) -> dict[tuple[Any, str], Any]:
    """Return the values of attributes on a rank, by owner and name."""
    values: dict[tuple[Any, str], Any] = {}
    for number in chosen:
        key = number.owner(block)
        values[key] = with_divided(values.get(key, getattr(*key)), number.place, ranks)
    return values


def _search(
    block: nn.Module,
    given: Arguments,
    groups: Groups,
    recording: Recording,
    chosen: tuple[Number, ...],
    candidates: Sequence[Number],
    failure: Failure,
    ranks: int,
) -> tuple[tuple[Number, ...], Failure | None] | None:
    ordered = _by_likelihood([c for c in candidates if c not in chosen and not c.value % ranks], groups, failure)
    trials = 0
    for count in range(1, MAX_TOGETHER + 1):
        for extra in combinations(ordered[: 40 if count < 3 else 12], count):
            trials += 1
            if trials > MAX_TRIALS:
                return None
            found = run_trials(block, given, groups, recording, chosen + extra, ranks)
            if found is None or found.order > failure.order:
                return chosen + extra, found
    return None


def _by_likelihood(candidates: Sequence[Number], groups: Groups, failure: Failure) -> list[Number]:
    """Sort: numbers of the failing group's modules that are a number of components or a width of it come first."""
    modules = {
        side.module for side, segments in groups.sides.items() if any(s.group == failure.group for s in segments)
    }
    scopes = {module.rpartition(".")[0] for module in modules}
    sizes = {s.size for segments in groups.sides.values() for s in segments if s.group == failure.group}
    widths = {sum(s.size for s in segments) for side, segments in groups.sides.items() if side.module in modules}
    count = groups.counts[failure.group] if failure.group is not None else 0

    def key(number: Number) -> tuple[Any, ...]:
        inside = any(f"{number.module}.".startswith(f"{s}.") or s.startswith(number.module) for s in scopes)
        plausible = 0 if number.value == count else 1 if number.value in sizes | widths else 2
        return (not inside, plausible, "head" not in number.attribute, len(number.module))

    return sorted(candidates, key=key)


def read_numbers(block: nn.Module, given: Arguments) -> list[Number]:
    """Run a block and return the whole numbers above one that its code read from its modules and their objects."""
    seen: dict[tuple[str, str], None] = {}
    with _spies(block, seen):
        args, kwargs = copy_arguments(given)
        with torch.no_grad():
            block(*args, **kwargs)
    numbers: list[Number] = []
    for module, attribute in seen:
        owner, name = Number(module, attribute, (), 0).owner(block)
        entries = places(getattr(owner, name))
        numbers += [Number(module, attribute, place, item) for place, item in entries if is_number(item)]
    return numbers


def _has_number(value: Any) -> bool:
    return any(is_number(item) for _, item in places(value))


@contextmanager
def _spies(block: nn.Module, seen: dict[tuple[str, str], None]) -> Iterator[None]:
    """Record reads of instance attributes that hold whole numbers, of modules and of their plain objects."""
    changed: list[tuple[Any, type]] = []
    known: set[int] = set()
    try:
        for path, module in block.named_modules():
            for prefix, owner in _owners(module):
                if id(owner) not in known and type(owner).__module__ != "builtins":
                    known.add(id(owner))
                    changed.append((owner, type(owner)))
                    owner.__class__ = _spy(type(owner), owner, path, prefix, seen)
        yield
    finally:
        for owner, kind in changed:
            owner.__class__ = kind


def _owners(module: nn.Module) -> list[tuple[str, Any]]:
    inner = [(f"{name}.", value) for name, value in vars(module).items() if not name.startswith("_")]
    return [("", module), *((name, value) for name, value in inner if is_plain_object(value))]


def _spy(kind: type, owner: Any, path: str, prefix: str, seen: dict[tuple[str, str], None]) -> type:
    numbers = {name for name, value in vars(owner).items() if name not in _DESCRIPTIVE and _has_number(value)}

    def read(self: Any, name: str) -> Any:
        if name in numbers and (path, prefix + name) not in seen:
            seen[path, prefix + name] = None
        return object.__getattribute__(self, name)

    return type(kind.__name__, (kind,), {"__getattribute__": read, "__qualname__": kind.__qualname__})
