"""Checks that the installed vLLM-Omni and vLLM have the properties that the kit depends on."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import inspect
import re
import textwrap
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from port_kit.errors import RegistrationError
from port_kit.escape import quoted, reason_of
from port_kit.upstream.registry import PATCHES, REGISTRY, Entry, Precondition
from port_kit.upstream.series import SERIES, installed_series

#: Operators whose CPU kernel was registered by the kit in this process.
OWN_KERNELS: set[str] = set()

#: Entries that held in this process, by name.
_held: dict[str, Entry] = {}


@dataclass(frozen=True)
class Difference:
    """Precondition that does not hold, with the expected and the found value."""

    precondition: Precondition
    expected: str
    found: str

    def __str__(self) -> str:
        kind, target = self.precondition.kind, self.precondition.target
        return f"{kind} of {target}: expected {quoted(self.expected, 400)}, got {quoted(self.found, 400)}"


def require(name: str) -> None:
    """Check all preconditions of a registry entry. An entry that holds is checked once per process.

    A no-op for a patch that the installed series does not need.

    Raises:
        RegistrationError: ``upstream_changed``; a precondition does not hold. ``vllm_omni_version``.
    """
    entry = REGISTRY[name]
    if _held.get(name) is entry or not is_needed(name):
        return
    for difference in differences(entry):
        remedy = f"adapt or remove the patch; see section {name} of" if name in PATCHES else "adapt the kit and"
        kind, target = difference.precondition.kind, difference.precondition.target
        raise RegistrationError(
            f"{name}: {kind} of {target}: expected {quoted(difference.expected, 400)}, "
            f"got {quoted(difference.found, 400)}.",
            code="upstream_changed",
            hint=f"{remedy} port_kit/upstream",
            entry=name,
            target=target,
        )
    _held[name] = entry


def is_needed(name: str) -> bool:
    """Return True if the installed series needs an entry: upstream has the fault that it repairs, or the used name.

    Raises:
        RegistrationError: ``vllm_omni_version``.
    """
    series = REGISTRY[name].series
    return series == SERIES or installed_series() in series


def differences(entry: Entry, series: str | None = None) -> Iterator[Difference]:
    """Yield the preconditions of an entry that do not hold; none of a patch that the series does not need.

    Args:
        entry: the entry.
        series: series whose values are expected; None for that of the installed vLLM-Omni, which is read only if a
            value depends on it.
    """
    if entry.series != SERIES and (series or installed_series()) not in entry.series:
        return
    for precondition in entry.preconditions:
        expected = precondition.expected
        if not isinstance(expected, str):
            expected = expected[series or installed_series()]
        if (found := read(precondition, expected)) != expected:
            yield Difference(precondition, expected, found)


def read(precondition: Precondition, expected: str) -> str:
    """Return the value of a property; ``missing (...)`` if the target does not exist."""
    kind, target = precondition.kind, precondition.target
    try:
        if kind in SUBSETS:
            names = SUBSETS[kind](target)
            return ", ".join(name for name in expected.split(", ") if name in names)
        return READERS[kind](target)
    except (ImportError, AttributeError, KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
        return f"missing ({type(error).__name__}: {reason_of(error)})"


def _mentions(target: str) -> Container[str]:
    """Return the words in the source of a module, class or function."""
    source = inspect.getsource(_object(target)) if ":" in target else _module_source(target)  # type: ignore[arg-type]
    return set(re.findall(r"\w+", source))


def _module_source(module: str) -> str:
    """Return the source of a module, which is not imported for it."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ImportError(f"{module} has no source")
    return Path(spec.origin).read_text(encoding="utf-8")


def _accepts(target: str) -> Container[str]:
    """Return the names of a function's parameters."""
    return _signature(target).parameters


def _attributes(target: str) -> Container[str]:
    """Return the names that a module or class has, and those that methods of a class assign to ``self``."""
    found = _object(target)
    names = set(dir(found))
    for owner in inspect.getmro(found) if isinstance(found, type) else ():
        names |= inspect.get_annotations(owner).keys() | _assigned(owner)
    return names


@cache
def _assigned(owner: type) -> frozenset[str]:
    """Return the attributes that a class's methods assign to ``self``; empty for a class without Python source."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(owner)))
    except (OSError, TypeError):
        return frozenset()
    stores = (node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store))
    return frozenset(node.attr for node in stores if isinstance(node.value, ast.Name) and node.value.id == "self")


def _object(target: str) -> object:
    module, _, path = target.partition(":")
    found: object = importlib.import_module(module)
    for part in path.split(".") if path else ():
        found = getattr(found, part)
    return found


def _signature(target: str) -> inspect.Signature:
    function = _object(target)
    if not callable(function):
        raise TypeError(f"{target} is not callable")
    return inspect.signature(function)


def _parameters(target: str) -> str:
    return ", ".join(_signature(target).parameters)


def _source(target: str) -> str:
    function = _object(target)
    if not inspect.isfunction(function):
        raise TypeError(f"{target} is not a Python function")
    return hashlib.sha256(inspect.getsource(function).encode()).hexdigest()[:16]


def _annotation(target: str) -> str:
    owner, _, field = target.rpartition(".")
    annotation = inspect.get_annotations(_class(owner))[field]
    return annotation if isinstance(annotation, str) else str(annotation)


def _class(target: str) -> type:
    found = _object(target)
    if not isinstance(found, type):
        raise TypeError(f"{target} is not a class")
    return found


def _schema(operator: str) -> str:
    import torch

    namespace, _, name = operator.partition("::")
    schema = getattr(getattr(torch.ops, namespace), name).default._schema
    return str(schema).removeprefix(operator)


def _cpu_kernel(operator: str) -> str:
    import torch

    if operator in OWN_KERNELS:
        return "none"
    return "registered" if torch._C._dispatch_has_kernel_for_dispatch_key(operator, "CPU") else "none"


#: Kinds whose expected value is a comma-separated list of names, each of which must be among those of the target.
SUBSETS: dict[str, Callable[[str], Container[str]]] = {
    "accepts": _accepts,
    "attributes": _attributes,
    "mentions": _mentions,
}
#: Kinds whose expected value is the complete value.
READERS: dict[str, Callable[[str], str]] = {
    "annotation": _annotation,
    "cpu_kernel": _cpu_kernel,
    "parameters": _parameters,
    "schema": _schema,
    "source": _source,
    "type": lambda target: type(_object(target)).__name__,
}
