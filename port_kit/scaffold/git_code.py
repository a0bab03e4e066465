"""The model's own code: its git repository at one commit, and the classes that have the names of the checkpoint.

The code is fetched and parsed, never executed.
"""

from __future__ import annotations

import ast
import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from port_kit.download import GitCode
from port_kit.download.gitcode import check_out, resolve_commit
from port_kit.errors import ScaffoldError
from port_kit.inspect.recognition import common_prefixes
from port_kit.manifest import Manifest
from port_kit.scaffold.parts import Part
from port_kit.scaffold.request import NewPort
from port_kit.scaffold.source import Source

#: Folders of a repository that hold no package of the model.
_ASIDE = {"assets", "benchmarks", "demo", "docs", "examples", "scripts", "src", "tests"}
#: Modules of a repository that are not imported.
_SCRIPTS = {"conftest", "setup"}
#: Folder that some repositories keep their packages in.
_SRC = "src"
#: Methods of a module that name what they are given.
_REGISTERS = ("add_module", "register_buffer", "register_module", "register_parameter")
#: Fewest top-level names of a checkpoint that tell one class from another.
_FEWEST = 2


@dataclass(frozen=True)
class FoundCode:
    """The model's code.

    Attributes:
        code: as a recipe has it, pinned to a commit.
        classes: ``{part: "module:Class"}`` of the parts whose tensors only that class has.
        signatures: ``{part: {parameter: default}}`` of their constructors, ``...`` for parameters without a default.
    """

    code: GitCode
    classes: Mapping[str, str] = field(default_factory=dict)
    signatures: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass
class _Class:
    """A class of the code: attributes that it and its bases assign, and the parameters of its constructor."""

    attributes: set[str]
    parameters: dict[str, Any] | None = None


def named_code(port: NewPort, sources: list[Source]) -> str:
    """Return the address that was given, or the only one that the cards name; empty if they name none.

    Raises:
        ScaffoldError: ``scaffold_unsupported``; the cards name several, or none for the path ``external``.
    """
    cards = [source.inspection.card for source in sources if source.inspection]
    named = list(dict.fromkeys(address for card in cards for address in card.code))
    if port.code:
        return port.code
    if len(named) > 1 or (not named and port.path == "external"):
        found = ", ".join(named) or "none"
        raise ScaffoldError(
            f"expected one git repository with the model's code in README.md, found {found}",
            code="scaffold_unsupported",
            hint=f"name it: port-kit new {port.name} --code GIT_URL --from {port.source}",
        )
    return named[0] if named else ""


def find_code(port: NewPort, url: str, parts: list[Part]) -> FoundCode:
    """Fetch the current commit of a repository; return its packages and the classes of the parts.

    Raises:
        DownloadError: ``code_url`` or ``code_broken``; the repository cannot be fetched.
        ScaffoldError: ``scaffold_unsupported``; it has no Python module.
    """
    asked = GitCode(f"{port.name}_original", url, packages=(port.name,))
    commit = resolve_commit(asked)
    with tempfile.TemporaryDirectory(prefix="port-kit-") as folder:
        check_out(asked, commit, Path(folder) / "repo")
        root = Path(folder) / "repo"
        path = "" if _packages(root) or not _packages(root / _SRC) else _SRC
        packages = _packages(root / path)
        if not packages:
            raise ScaffoldError(
                f"{url} at {commit}: expected a Python package, found none",
                code="scaffold_unsupported",
                hint=f"name the repository of the model's code: port-kit new {port.name} --code GIT_URL",
            )
        classes = _find_classes(root / path, packages)
    found = {part.name: _class_of(part, classes) for part in parts if part.is_own}
    named = {name: place for name, place in found.items() if place}
    used = dict.fromkeys(place.partition(":")[0].partition(".")[0] for place in named.values())
    signatures = {name: classes[place].parameters or {} for name, place in named.items()}
    return FoundCode(GitCode(asked.name, url, tuple(used or packages), commit=commit, path=path), named, signatures)


def _packages(root: Path) -> list[str]:
    """Return the importable modules and packages of a folder."""
    folders = [path.parent.name for path in root.glob("*/*.py")]
    modules = [path.stem for path in root.glob("*.py") if path.stem not in _SCRIPTS]
    return sorted({name for name in (*folders, *modules) if name.isidentifier() and name not in _ASIDE})


def _find_classes(root: Path, packages: list[str]) -> dict[str, _Class]:
    """Return ``{"module:Class": class}``; files that are no Python are left out."""
    own: dict[str, _Class] = {}
    bases: dict[str, list[str]] = {}
    by_name: dict[str, str] = {}
    for module, tree in _modules(root, packages):
        for node in (node for node in tree.body if isinstance(node, ast.ClassDef)):
            place = f"{module}:{node.name}"
            own[place], by_name[node.name] = _Class(set(_assigned(node)), _parameters(node)), place
            bases[place] = [base.id for base in node.bases if isinstance(base, ast.Name)]
    for place, names in bases.items():
        for base in (own[by_name[name]] for name in names if name in by_name):
            own[place].attributes |= base.attributes
            own[place].parameters = base.parameters if own[place].parameters is None else own[place].parameters
    return own


def _parameters(node: ast.ClassDef) -> dict[str, Any] | None:
    """Return the parameters of a constructor with their defaults, ``...`` for those without; None if it has none.

    Parameters whose default is an object of code are left out.
    """
    found = [item for item in node.body if isinstance(item, ast.FunctionDef) and item.name == "__init__"]
    if not found:
        return None
    given = found[0].args
    names = [*given.posonlyargs, *given.args]
    padded = [None] * (len(names) - len(given.defaults)) + list(given.defaults)
    pairs = [*zip(names[1:], padded[1:], strict=True), *zip(given.kwonlyargs, given.kw_defaults, strict=True)]
    return {
        name.arg: ... if default is None else ast.literal_eval(default) for name, default in pairs if _is_plain(default)
    }


def _is_plain(default: ast.expr | None) -> bool:
    """Return True without a default, and for a default that a ``config.json`` can hold."""
    try:
        json.dumps(None if default is None else ast.literal_eval(default))
    except (ValueError, TypeError):
        return False
    return True


def _modules(root: Path, packages: list[str]) -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        if parts and parts[0] in packages and all(part.isidentifier() for part in parts):
            try:
                yield ".".join(parts), ast.parse(path.read_bytes())
            except (SyntaxError, ValueError, RecursionError):  # code of another Python, or generated code
                continue


def _assigned(node: ast.ClassDef) -> Iterator[str]:
    """Yield the names that methods give to attributes, buffers and parameters of ``self``."""
    for inner in ast.walk(node):
        if isinstance(inner, ast.Attribute) and isinstance(inner.ctx, ast.Store) and isinstance(inner.value, ast.Name):
            if inner.value.id == "self":
                yield inner.attr
        elif isinstance(inner, ast.Call) and isinstance(inner.func, ast.Attribute) and inner.args:
            first = inner.args[0]
            if isinstance(first, ast.Constant) and isinstance(first.value, str) and inner.func.attr in _REGISTERS:
                yield first.value


def _class_of(part: Part, classes: Mapping[str, _Class]) -> str:
    """Return the one class that has all top-level names of a part's tensors; empty if there is none, or several."""
    prefix = own_prefix(part)
    names = {name.removeprefix(prefix).partition(".")[0] for name in _manifest(part)}
    fitting = {place: len(found.attributes) for place, found in classes.items() if names <= found.attributes}
    closest = [place for place, count in fitting.items() if count == min(fitting.values())]
    return closest[0] if len(names) >= _FEWEST and len(closest) == 1 else ""


def own_prefix(part: Part) -> str:
    """Return the leading name parts of all tensors, below which several names begin: ``module.`` or nothing."""
    manifest, prefix = _manifest(part), ""
    for prefix in common_prefixes(manifest):
        if len({name.removeprefix(prefix).partition(".")[0] for name in manifest}) >= _FEWEST:
            return prefix
    return prefix


def _manifest(part: Part) -> Manifest:
    return part.component.manifest if part.component else Manifest({})
