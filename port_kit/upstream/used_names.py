"""Names of vLLM-Omni and vLLM that the kit uses, read from its source and from the registry.

A name is dotted, such as ``vllm_omni.diffusion.data.DiffusionOutput.from_exception``.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from port_kit.upstream.registry import REGISTRY

PACKAGES = ("vllm_omni", "vllm")
#: A class path in a string, as upstream's plugin interfaces take them.
_CLASS_PATH = re.compile(rf"(?:{'|'.join(PACKAGES)})(?:\.[a-z_]\w*)+\.[A-Z]\w*")


@dataclass(frozen=True)
class UsedNames:
    """Names that the kit uses.

    Attributes:
        names: users of each imported name and of attributes of it: files of the kit and entries of the registry.
        members: by file, the names of all attributes that it accesses and of all functions that it defines; those of
            an imported class are methods that the file calls or overrides.
    """

    names: Mapping[str, frozenset[str]]
    members: Mapping[str, frozenset[str]]

    def members_of(self, name: str) -> frozenset[str]:
        """Return the member names in the files that use a name."""
        return frozenset().union(*(self.members.get(user, frozenset()) for user in self.names[name]))

    def users(self, name: str) -> list[str]:
        """Return the sorted users of a name or of a member of a used class; empty if the kit does not use it."""
        owner, _, leaf = name.rpartition(".")
        found = self.names.get(name, frozenset())
        inherited = (user for user in self.names.get(owner, ()) if leaf in self.members.get(user, ()))
        return sorted(found.union(inherited))


def used_names(series: str | None = None) -> UsedNames:
    """Return the names in the source of ``port_kit`` and ``models``, and the targets of the registry.

    Args:
        series: leave out entries of the registry that this series does not need; None for all entries.
    """
    names: dict[str, set[str]] = defaultdict(set)
    members: dict[str, frozenset[str]] = {}
    for path, label in source_files().items():
        tree = ast.parse(path.read_bytes())
        found = set(_names(tree))
        for name in found:
            names[name].add(label)
        if found:
            members[label] = frozenset(_members(tree))
    for entry in REGISTRY.values():
        if series is not None and series not in entry.series:
            continue
        for precondition in entry.preconditions:
            if "::" not in precondition.target:
                names[precondition.target.replace(":", ".")].add(f"registry entry {entry.name}")
    return UsedNames({name: frozenset(users) for name, users in names.items()}, members)


def source_files() -> dict[Path, str]:
    """Return the Python files of ``port_kit`` and ``models``, with their paths in the repository."""
    kit = Path(__file__).parents[1]
    spec = importlib.util.find_spec("port_kit.models")
    assert spec is not None and spec.submodule_search_locations
    models = Path(next(iter(spec.submodule_search_locations)))
    found = {path: f"port_kit/{path.relative_to(kit)}" for path in sorted(kit.rglob("*.py"))}
    return found | {path: f"models/{path.relative_to(models)}" for path in sorted(models.rglob("*.py"))}


def _names(tree: ast.Module) -> Iterator[str]:
    """Yield imported names, attributes of them, and class paths in strings."""
    aliases = dict(_imports(tree))
    yield from aliases.values()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            chain = _chain(node)
            if chain and chain[0] in aliases:
                yield ".".join((aliases[chain[0]], *chain[1:]))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and _CLASS_PATH.fullmatch(node.value):
            yield node.value


def _imports(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Yield (name in the file, name upstream), including imports within functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not node.level and node.module and _is_upstream(node.module):
            yield from ((alias.asname or alias.name, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if _is_upstream(alias.name):
                    yield (alias.asname, alias.name) if alias.asname else (alias.name.partition(".")[0],) * 2


def _is_upstream(module: str) -> bool:
    return module.partition(".")[0] in PACKAGES


def _chain(node: ast.expr) -> tuple[str, ...]:
    """Return the names of ``a.b.c``; empty for other expressions."""
    if isinstance(node, ast.Name):
        return (node.id,)
    if isinstance(node, ast.Attribute) and (owner := _chain(node.value)):
        return (*owner, node.attr)
    return ()


def _members(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node.name
