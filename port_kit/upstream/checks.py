"""Checks that the installed vLLM-Omni and vLLM have the properties that the kit depends on."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import re
from collections.abc import Callable

from port_kit.errors import RegistrationError
from port_kit.upstream.registry import PATCHES, REGISTRY, Precondition
from port_kit.upstream.series import installed_series

#: Operators whose CPU kernel was registered by the kit in this process.
OWN_KERNELS: set[str] = set()


def require(name: str) -> None:
    """Check all preconditions of a registry entry.

    Raises:
        RegistrationError: ``upstream_changed``; a precondition does not hold. ``vllm_omni_version``.
    """
    series = installed_series()
    for precondition in REGISTRY[name].preconditions:
        expected = precondition.value(series)
        if (found := read(precondition, expected)) != expected:
            remedy = f"adapt or remove the patch; see section {name} of" if name in PATCHES else "adapt the kit and"
            raise RegistrationError(
                f"{name}: {precondition.kind} of {precondition.target}: expected {expected!r}, got {found!r}.",
                code="upstream_changed",
                hint=f"{remedy} port_kit/upstream",
                entry=name,
                target=precondition.target,
            )


def read(precondition: Precondition, expected: str) -> str:
    """Return the value of a property; ``missing (...)`` if the target does not exist."""
    kind, target = precondition.kind, precondition.target
    try:
        return _mentions(target, expected) if kind == "mentions" else READERS[kind](target)
    except (ImportError, AttributeError, KeyError, OSError, RuntimeError, TypeError) as error:
        return f"missing ({type(error).__name__}: {error})"


def _mentions(target: str, names: str) -> str:
    """Return those of the comma-separated ``names`` that the source of a function or class contains."""
    words = set(re.findall(r"\w+", inspect.getsource(_object(target))))  # type: ignore[arg-type]
    return ", ".join(name for name in names.split(", ") if name in words)


def _object(target: str) -> object:
    module, _, path = target.partition(":")
    found: object = importlib.import_module(module)
    for part in path.split("."):
        found = getattr(found, part)
    return found


def _parameters(target: str) -> str:
    function = _object(target)
    if not callable(function):
        raise TypeError(f"{target} is not callable")
    return ", ".join(inspect.signature(function).parameters)


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


READERS: dict[str, Callable[[str], str]] = {
    "annotation": _annotation,
    "cpu_kernel": _cpu_kernel,
    "parameters": _parameters,
    "schema": _schema,
    "source": _source,
    "type": lambda target: type(_object(target)).__name__,
}
