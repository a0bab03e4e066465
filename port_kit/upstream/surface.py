"""Surface of upstream that the kit uses: kind, signature and digest of the source of every used name.

A surface is recorded per release series in ``surface_SERIES.json``, one line per name.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import pkgutil
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

from port_kit.errors import RegistrationError
from port_kit.upstream.used_names import PACKAGES, UsedNames

FOLDER = Path(__file__).parent
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


class Described(NamedTuple):
    """Properties of a name.

    Attributes:
        kind: ``module``, ``class``, ``function``, ``property`` or ``object``.
        signature: parameters with defaults, without annotations; empty if there is none.
        digest: first digits of the SHA-256 of the source; empty for modules and objects.
    """

    kind: str
    signature: str
    digest: str


@dataclass(frozen=True)
class Surface:
    """Used names of one release.

    Attributes:
        release: version of vLLM-Omni.
        names: properties of each name that exists.
        missing: error of each used name that does not exist.
    """

    release: str
    names: Mapping[str, Described]
    missing: Mapping[str, str]


def read_installed(used: UsedNames, release: str) -> Surface:
    """Describe the used names of the installed packages, which are imported."""
    names: dict[str, Described] = {}
    missing: dict[str, str] = {}
    for name in used.names:
        try:
            found = _resolve(name)
        except Exception as error:  # an upstream module may raise anything when it is imported
            missing[name] = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
            continue
        if found is not None:
            names[name] = _describe(found.value)
            names |= {f"{name}.{member}": made for member, made in _methods(found.value, used.members_of(name))}
    return Surface(release, dict(sorted(names.items())), missing)


class _Found(NamedTuple):
    value: Any


def _resolve(name: str) -> _Found | None:
    """Return the object; None for an attribute of an object that is neither a module nor a class.

    Such objects depend on the machine, for example the current platform.
    """
    owner, _, leaf = name.rpartition(".")
    parent = pkgutil.resolve_name(owner) if owner else None
    if parent is None or inspect.ismodule(parent):
        return _Found(pkgutil.resolve_name(name))
    if not isinstance(parent, type):
        return None
    if leaf in inspect.get_annotations(parent) and not hasattr(parent, leaf):
        return None  # a field; the signature of the class has it
    return _Found(getattr(parent, leaf))


def _methods(owner: Any, names: frozenset[str]) -> Iterator[tuple[str, Described]]:
    """Yield those of the names that are methods or properties of an upstream class, inherited ones included."""
    if not isinstance(owner, type):
        return
    for name in names - {"__init__"}:  # its signature is that of the class
        definer = next((each for each in owner.__mro__ if name in vars(each)), None)
        if definer is None or definer.__module__.partition(".")[0] not in PACKAGES:
            continue
        made = _describe(getattr(owner, name))
        if made.kind in ("function", "property"):
            yield name, made


def _describe(value: Any) -> Described:
    if inspect.ismodule(value):
        return Described("module", "", "")
    if isinstance(value, property):
        return Described("property", "", _digest(value.fget))
    if isinstance(value, type):
        return Described("class", "" if issubclass(value, Enum) else _signature(value), _digest(value))
    if inspect.isroutine(value):
        return Described("function", _signature(value), _digest(value))
    return Described("object", "", "")


def _signature(value: Any) -> str:
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):  # of a builtin
        return ""
    plain = [each.replace(annotation=inspect.Parameter.empty) for each in signature.parameters.values()]
    text = str(signature.replace(parameters=plain, return_annotation=inspect.Signature.empty))
    return _ADDRESS.sub("", text)


def _digest(value: Any) -> str:
    try:
        return hashlib.sha256(inspect.getsource(value).encode()).hexdigest()[:12]
    except (OSError, TypeError):  # of a builtin
        return ""


# -- records -----------------------------------------------------------------------------------------------------------


def recorded_series() -> list[str]:
    """Return the series with a record, oldest first."""
    found = [path.stem.removeprefix("surface_") for path in FOLDER.glob("surface_*.json")]
    return sorted(found, key=lambda series: [int(part) for part in series.split(".")])


def record_path(series: str) -> Path:
    """Return the path of the record of a series, which may not exist."""
    return FOLDER / f"surface_{series}.json"


def read_record(series: str) -> Surface:
    """Read the record of a series.

    Raises:
        RegistrationError: ``upstream_record``; there is none.
    """
    path = record_path(series)
    if not path.is_file():
        raise RegistrationError(
            f"Recorded surface of vLLM-Omni: expected series {', '.join(recorded_series())}, got {series}.",
            code="upstream_record",
            hint="in an environment with that release: python -m port_kit.runtime.upstream_report --record",
        )
    data = json.loads(path.read_text(encoding="utf-8"))
    return Surface(data["release"], {name: Described(*entry) for name, entry in data["names"].items()}, {})


def write_record(surface: Surface, series: str) -> Path:
    """Write the record of a series and return its path."""
    lines = [f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in surface.names.items()]
    path = record_path(series)
    text = f'{{\n "release": {json.dumps(surface.release)},\n "names": {{\n' + ",\n".join(lines) + "\n }\n}\n"
    path.write_text(text, encoding="utf-8")
    return path
