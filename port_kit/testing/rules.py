"""Helpers for tests of a port's rules, from manifests alone: coverage, round trips and mutations.

::

    plan = assert_covers(RULES, Manifest.from_json(path), Manifest.from_module(module_on_meta))
    assert_round_trip(plan)
    assert_mutations_caught(plan)
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from port_kit.manifest import Manifest, TensorSpec
from port_kit.regions import Shape
from port_kit.remap.coverage import Coverage
from port_kit.remap.plan import Plan, check
from port_kit.remap.resolve import Resolved, Resolver
from port_kit.remap.rule import Rules
from port_kit.remap.tensor_ops import Reshape

if TYPE_CHECKING:
    from torch import Tensor


def assert_covers(
    rules: Rules,
    source: Manifest,
    target: Manifest,
    sizes: Mapping[str, int] | None = None,
    *,
    allow_downcast: bool = False,
) -> Plan:
    """Assert that every element of both sides is accounted for; returns the plan.

    Raises:
        AssertionError: with the report of all gaps.
    """
    plan = check(rules, source, target, sizes, allow_downcast=allow_downcast)
    assert plan.ok, Coverage(plan).to_text()
    return plan


def values(manifest: Manifest) -> dict[str, Tensor]:
    """A tensor for every name, different in every tensor and the same in every run."""
    import torch

    tensors = {}
    for name, spec in manifest.items():
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big")
        generator = torch.Generator().manual_seed(seed)
        tensor = torch.randint(0, 256, spec.shape, generator=generator, dtype=torch.int64)
        tensors[name] = tensor.to(getattr(torch, spec.dtype))
    return tensors


def assert_round_trip(plan: Plan) -> None:
    """Assert that converting random values and going back by the plan gives the same bits.

    Sources that an inexact transform or a rounding touches are left out; see :func:`port_kit.remap.export.inexact`.
    """
    import torch

    from port_kit.remap.export import convert, export, inexact

    sources = values(plan.source)
    targets = dict(convert(plan, sources))
    lossy = inexact(plan)
    returned = dict(export(plan, targets))
    expected = {task.source for task in plan.tasks}
    assert set(returned) == expected, sorted(set(returned) ^ expected)
    for name, tensor in returned.items():
        if name not in lossy:
            assert torch.equal(tensor, sources[name]), f"{name} does not come back as it was"


def mutations(plan: Plan) -> Iterator[tuple[str, Manifest]]:
    """Every source of a plan dropped, renamed, reshaped, duplicated and retyped in turn.

    Sources that rules drop are not mutated: unused tensors may be missing or different.

    Yields:
        ``(description, mutated source manifest)``.
    """
    source = dict(plan.source)
    for name in plan.by_source():
        spec = source[name]
        yield f"drop {name}", Manifest({key: value for key, value in source.items() if key != name})
        renamed = {f"{key}_renamed" if key == name else key: value for key, value in source.items()}
        yield f"rename {name}", Manifest(renamed)
        yield f"duplicate {name}", Manifest({**source, f"copy_of.{name}": spec})
        for what, shape in _other_shapes(spec.shape):
            yield f"{what} {name}", Manifest({**source, name: replace(spec, shape=shape)})
        if spec.dtype != "complex64":
            yield f"retype {name}", Manifest({**source, name: replace(spec, dtype="complex64")})


def _other_shapes(shape: Shape) -> Iterator[tuple[str, Shape]]:
    """Shapes with more elements, and others of as many."""
    for axis, extent in enumerate(shape):
        yield f"grow axis {axis} of", (*shape[:axis], extent + 1, *shape[axis + 1 :])
    yield "add an axis to", (1, *shape)
    if len(shape) > 1:
        yield "flatten", (math.prod(shape),)
    if len(set(shape[:2])) > 1:
        yield "turn", (shape[1], shape[0], *shape[2:])


@dataclass(frozen=True)
class Mutated:
    """Result of mutating a plan's source.

    Attributes:
        count: how many were tried.
        same: those that are accepted and copy the same bytes to the same places. If a rule itself reshapes a
            tensor to its target, a source of another shape with as many elements, stored in the same row-major order,
            is read exactly alike: headers cannot distinguish the two, and no byte is lost. A rule that must distinguish
            them names the axes (``rearrange``) instead of ``reshape``.
        uncaught: those that are accepted and mean something else.
    """

    count: int
    same: tuple[str, ...]
    uncaught: tuple[str, ...]

    @property
    def caught(self) -> int:
        """Number of mutations that raised an error."""
        return self.count - len(self.same) - len(self.uncaught)


def mutated(plan: Plan) -> Mutated:
    """Try every mutation of :func:`mutations` on a plan."""
    resolver = _CachedResolver(plan.rules, plan.target, plan.sizes)
    expected = _bytes_moved(plan)
    same: list[str] = []
    uncaught: list[str] = []
    count = 0
    for what, source in mutations(plan):
        count += 1
        other = check(plan.rules, source, plan.target, plan.sizes, resolver=resolver)
        if other.ok:
            (same if _bytes_moved(other) == expected else uncaught).append(what)
    return Mutated(count, tuple(same), tuple(uncaught))


def uncaught_mutations(plan: Plan) -> list[str]:
    """The mutations of a plan's source that its rules accept although they mean something else."""
    return list(mutated(plan).uncaught)


def _bytes_moved(plan: Plan) -> set[tuple[object, ...]]:
    """Return the byte copies of a plan, independent of the shapes under which sources describe the same bytes."""
    moved: set[tuple[object, ...]] = set()
    for task in plan.tasks:
        spec = plan.source[task.source]
        shape, ops = spec.shape, list(task.ops)
        while ops and isinstance(ops[0], Reshape):
            shape = ops.pop(0).after
        moved.add((task.source, spec.dtype, shape, tuple(ops), task.target, task.region, task.join, task.role))
    return moved


class _CachedResolver(Resolver):
    """A resolver that caches its results: a mutation changes one of hundreds of tensors."""

    def resolve(self, name: str, spec: TensorSpec) -> Resolved:
        known: dict[object, Resolved] = self.__dict__.setdefault("known", {})
        key = (name, spec.shape, spec.dtype)
        if key not in known:
            known[key] = super().resolve(name, spec)
        return known[key]


def assert_mutations_caught(plan: Plan) -> Mutated:
    """Assert that no mutation of the source that means something else is accepted; returns the counts.

    Raises:
        AssertionError: with the first mutations that are accepted.
    """
    found = mutated(plan)
    uncaught = found.uncaught
    assert not uncaught, f"{len(uncaught)} of {found.count} mutations are accepted, such as {', '.join(uncaught[:5])}"
    return found
