"""Recognition of components by content: the names and shapes of their tensors, not the names of their files.

A checkpoint is a known component if the rules of a port's component map it completely onto the recorded manifest of
that component. Nothing but registered ports and their recordings is consulted, so private ports extend the list.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from port_kit.errors import PortKitError
from port_kit.inspect.clip import recognize_clip
from port_kit.inspect.report import Recognized
from port_kit.manifest import Manifest
from port_kit.port import Component, resolve
from port_kit.registry import list_ports
from port_kit.remap.names import template_of
from port_kit.remap.ops import parse_rearrange
from port_kit.remap.patterns import compile_pattern
from port_kit.remap.plan import check
from port_kit.remap.problems import Problem
from port_kit.remap.rules import RuleSet
from port_kit.runtime.target_cache import recorded_manifest

#: Most name parts above the tensors of a component, such as ``module.`` of DataParallel.
_MOST_PREFIXES = 3
#: Problems that other widths and numbers of layers cause.
_OF_SIZES = {"remap_beyond_layers", "remap_missing", "remap_shape"}


@dataclass(frozen=True)
class _Known:
    """A component of a port with its rules and its full-size target."""

    port: str
    component: Component
    rules: RuleSet
    target: Manifest
    matchers: tuple[Callable[[str], object], ...]

    def has_names_of(self, checkpoint: Manifest) -> bool:
        """Return True if a rule takes every tensor, or the names are those of the module."""
        if any(name not in self.target for name in checkpoint):
            return all(any(match(name) for match in self.matchers) for name in checkpoint)
        return True

    def reads_other_axes(self, checkpoint: Manifest) -> bool:
        """Return True if a rule rearranges a tensor of another number of axes: a convolution of another kind."""
        for rule in self.rules:
            first = rule.op[0] if rule.op and rule.source else None
            if first is None or first.name != "rearrange" or "..." in first.get("pattern"):
                continue
            axes = len(parse_rearrange(first.get("pattern"))[0])
            match = compile_pattern(rule.source).fullmatch
            if any(len(spec.shape) != axes for name, spec in checkpoint.items() if match(name)):
                return True
        return False


def recognize(checkpoint: Manifest) -> Recognized | None:
    """Return the known component whose tensors a checkpoint holds, or None."""
    for prefix in common_prefixes(checkpoint):
        bare = Manifest({name.removeprefix(prefix): spec for name, spec in checkpoint.items()})
        found = _of_a_port(bare, prefix) or (None if prefix else recognize_clip(bare))  # transformers reads no prefixes
        if found is not None:
            return found
    return None


def common_prefixes(checkpoint: Manifest) -> Iterator[str]:
    """Yield the empty prefix, then the leading name parts that all tensors share: ``module.``, ``module.net.``."""
    yield ""
    first, *others = [name.split(".") for name in checkpoint] or [[]]
    for count in range(1, min(len(first), _MOST_PREFIXES + 1)):
        if any(name[:count] != first[:count] for name in others) or first[count - 1].isdigit():
            return
        yield ".".join(first[:count]) + "."


def _of_a_port(checkpoint: Manifest, prefix: str) -> Recognized | None:
    """Return a port's component; one of other sizes only if there is none of the same sizes."""
    resized: Recognized | None = None
    for known in _known_components():
        if not known.has_names_of(checkpoint):
            continue
        problems = check(known.rules, checkpoint, known.target, allow_downcast=True).problems
        if not _only_sizes_differ(problems, known.target) or known.reads_other_axes(checkpoint):
            continue
        found = _recognized(known, prefix, len(problems))
        if not problems:
            return found
        resized = resized or found
    return resized


def _only_sizes_differ(problems: Sequence[Problem], target: Manifest) -> bool:
    """Return True if the problems are those of the same module with other widths or numbers of layers."""
    if any(problem.code not in _OF_SIZES for problem in problems):
        return False
    missing = {problem.target for problem in problems if problem.code == "remap_missing"}
    return {template_of(name) for name in missing} <= {template_of(name) for name in target if name not in missing}


def _recognized(known: _Known, prefix: str, misfits: int) -> Recognized:
    part = known.component
    return Recognized(
        name=part.name,
        kind=part.kind,
        origin=f"the {part.name} of the port {known.port}",
        prefix=prefix,
        port=known.port,
        build=part.build,
        rules=part.rules,
        config=part.config,
        misfits=misfits,
    )


@cache
def _known_components() -> tuple[_Known, ...]:
    """Return the components of all ports that have a recording, each module and rule set once."""
    found: dict[tuple[str, str, str], _Known] = {}
    for port in list_ports().values():
        for component in port.components:
            key = (component.build, component.rules, component.config)
            known = None if key in found else _read(port.name, component)
            if known is not None:
                found[key] = known
    return tuple(found.values())


def _read(port_name: str, component: Component) -> _Known | None:
    target = recorded_manifest(list_ports()[port_name], component.name)
    rules: Any = resolve(component.rules) if target is not None else None
    if target is None or not isinstance(rules, RuleSet):
        return None
    try:
        matchers = tuple(compile_pattern(rule.source).fullmatch for rule in rules if rule.source)
    except PortKitError:  # a private port with a broken rule has its own error elsewhere
        return None
    return _Known(port_name, component, rules, target, matchers)
