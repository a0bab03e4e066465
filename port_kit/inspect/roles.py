"""Relations between components: transformers of one architecture, and all transformers of a port."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from port_kit.inspect.components import denoises, index_path
from port_kit.inspect.documents import Documents
from port_kit.inspect.report import Component, Finding
from port_kit.port import DENOISERS
from port_kit.registry import list_ports

#: Entry of an index that says at which share of the noise a second transformer takes over.
BOUNDARY = "boundary_ratio"


def find_roles(documents: Documents, components: Sequence[Component]) -> Iterator[Finding]:
    """Yield the findings about several components together."""
    index = index_path(documents)
    boundary = boundary_of(documents.object(index))
    for experts in same_architecture(components):
        names = " and ".join(part.name for part in experts)
        fact = f"{names} have the same tensors and weights of their own"
        if boundary is not None:
            fact += f": {BOUNDARY} {boundary} of {index} is the noise below which {experts[-1].name} runs"
        yield Finding(experts[0].weights[0].path, fact)
    yield from _transformers_of_ports(components)


def boundary_of(index: Mapping[str, Any]) -> float | None:
    """Return the share of the noise at which an index lets a second transformer take over; None if it has none."""
    value = index.get(BOUNDARY)
    return float(value) if isinstance(value, (int, float)) else None


def same_architecture(components: Sequence[Component]) -> list[list[Component]]:
    """Return the components with equal names and shapes, in their order, several of each; none without tensors."""
    groups: dict[tuple[tuple[str, tuple[int, ...]], ...], list[Component]] = {}
    for part in components:
        if part.tensors and not part.known:
            key = tuple(sorted((name, spec.shape) for name, spec in part.manifest.items()))
            groups.setdefault(key, []).append(part)
    return [group for group in groups.values() if len(group) > 1]


def _transformers_of_ports(components: Sequence[Component]) -> Iterator[Finding]:
    """Yield the ports whose transformers, and modules that these call, are all there."""
    found = [part for part in components if part.recognized is not None and denoises(part)]
    for port in list_ports().values():
        own = [part for part in found if part.recognized is not None and part.recognized.port == port.name]
        wanted = Counter((part.rules, part.config) for part in port.components if part.kind in DENOISERS)
        given = Counter((part.recognized.rules, part.recognized.config) for part in own if part.recognized)
        if len(own) > 1 and given == wanted:
            *names, last = [part.name for part in own]
            fact = f"{', '.join(names)} and {last} are what denoises in the port {port.name}"
            yield Finding(own[0].weights[0].path, fact)
