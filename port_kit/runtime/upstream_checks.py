"""Checks that the installed vLLM-Omni has the properties that patches depend on."""

from __future__ import annotations

import hashlib
import importlib
import inspect
from collections.abc import Callable

from port_kit.errors import RegistrationError
from port_kit.runtime.patch_registry import PATCHES, SUPPORTED_SERIES, Precondition

#: Operators whose CPU kernel was registered by the kit in this process.
OWN_KERNELS: set[str] = set()


def check_version() -> None:
    """Check the installed vLLM-Omni's version.

    Raises:
        RegistrationError: ``vllm_omni_version``; it is not in the supported series.
    """
    from vllm_omni.version import __version__

    if __version__ != SUPPORTED_SERIES and not __version__.startswith(f"{SUPPORTED_SERIES}."):
        raise RegistrationError(
            f"vLLM-Omni: expected version {SUPPORTED_SERIES}.x, got {__version__}.",
            code="vllm_omni_version",
            hint=f"pip install 'vllm-omni>={SUPPORTED_SERIES},<0.31', or install a port-kit for {__version__}",
            found=__version__,
        )


def require(name: str) -> None:
    """Check all preconditions of the patch ``name``.

    Raises:
        RegistrationError: ``upstream_changed``; a precondition does not hold.
    """
    for precondition in PATCHES[name].preconditions:
        found = _read(precondition)
        if found not in precondition.expected:
            raise RegistrationError(
                f"Patch {name}: {precondition.kind} of {precondition.target}:"
                f" expected {' or '.join(map(repr, precondition.expected))}, got {found!r}.",
                code="upstream_changed",
                hint=f"adapt or remove the patch; see section {name} of port_kit/runtime/patches.md",
                patch=name,
                target=precondition.target,
            )


def _read(precondition: Precondition) -> str:
    """Return the value of a property; ``missing (...)`` if the target does not exist."""
    try:
        return READERS[precondition.kind](precondition.target)
    except (ImportError, AttributeError, KeyError, OSError, RuntimeError, TypeError) as error:
        return f"missing ({type(error).__name__}: {error})"


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
