"""Classes of vLLM-Omni, diffusers and transformers, read from their source without importing them.

Importing them is slow and requires torch. Their registries are literals, which are parsed instead. A registry that is
not found is an error, because an incomplete registry would give a wrong answer.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NoReturn

from port_kit.errors import OptionalDependencyError, RegistrationError

_CLASS = re.compile(rb"^class (\w+)", re.MULTILINE)
_INSTALL = (
    "install the runtime: pip install 'port-kit[omni]'; for inspecting alone their sources are enough: "
    "pip install --no-deps vllm-omni diffusers transformers"
)


@dataclass(frozen=True)
class OmniRegistries:
    """The registries of the installed vLLM-Omni.

    Attributes:
        version: of the installed package.
        pipelines: ``{_class_name: "folder.module"}`` of diffusion pipelines.
        stages: keys of multi-stage pipelines (``bagel``), matched with ``model_type`` and with folder names.
        stage_classes: ``{_class_name: key}`` of multi-stage pipelines that are known by a diffusers class.
        by_model_type: ``{model_type of the root config.json: pipeline class}``.
        by_architecture: ``{entry of architectures in the root config.json: pipeline class}``.
    """

    version: str
    pipelines: Mapping[str, str]
    stages: tuple[str, ...]
    stage_classes: Mapping[str, str]
    by_model_type: Mapping[str, str]
    by_architecture: Mapping[str, str]


@cache
def omni() -> OmniRegistries:
    """Read vLLM-Omni's registries.

    Raises:
        OptionalDependencyError: it is not installed.
        RegistrationError: ``upstream_changed`` if a registry is not found.
    """
    models = _table("vllm_omni", "diffusion/registry.py", "_DIFFUSION_MODELS")
    stages = _table("vllm_omni", "config/pipeline_registry.py", "OMNI_PIPELINES")
    by_model_type, by_architecture = _root_config_rules(_parse("vllm_omni", "diffusion/data.py"))
    return OmniRegistries(
        version=_version("vllm-omni"),
        pipelines={_text(key): ".".join(_strings(value)[:2]) for key, value in models},
        stages=tuple(_text(key) for key, _ in stages),
        stage_classes=dict(_stage_classes()),
        by_model_type=by_model_type,
        by_architecture=by_architecture,
    )


@cache
def diffusers_names() -> Mapping[str, str]:
    """Return ``{public class: part of diffusers}`` (``models``, ``pipelines``, ``schedulers`` ...).

    Raises:
        OptionalDependencyError: diffusers is not installed.
        RegistrationError: its lazy import table is not found.
    """
    names = dict(_lazy_table(_parse("diffusers", "__init__.py")))
    if not names:
        _changed("diffusers", "__init__.py", "_import_structure")
    return names


def library_has(library: str, class_name: str) -> bool:
    """Return True if a library of ``model_index.json`` has a class.

    Known libraries are diffusers, the folders of its pipelines, and transformers. Others are the model's own code.
    """
    if library == "diffusers":
        return class_name in diffusers_names()
    if library == "transformers":
        return _transformers_has(class_name)
    folder = _root("diffusers") / "pipelines" / library
    return library.isidentifier() and folder.is_dir() and class_name in _classes(folder.glob("*.py"))


@cache
def library_version(library: str) -> str:
    """``diffusers 0.40.0``."""
    return f"{library} {_version(library)}"


def _transformers_has(class_name: str) -> bool:
    """transformers 5 keeps ``Fast`` names of tokenizers with one form, without a class of that name."""
    names = {class_name}
    if class_name.endswith(("TokenizerFast", "ImageProcessorFast")):
        names.add(class_name.removesuffix("Fast"))
    return not names.isdisjoint(_transformers_names())


@cache
def _transformers_names() -> frozenset[str]:
    """All classes of transformers' models, and the further entries of its lazy table."""
    root = _root("transformers")
    public = dict(_lazy_table(_parse("transformers", "__init__.py")))
    if not public or not (root / "models").is_dir():
        _changed("transformers", "__init__.py", "_import_structure")
    return frozenset(public) | frozenset(_classes((root / "models").glob("*/*.py")))


def _classes(files: Iterable[Path]) -> Iterator[str]:
    """Names of the classes that files define. Parsing 40 MB of source would take minutes; one search takes a second."""
    for file in files:
        yield from (name.decode() for name in _CLASS.findall(file.read_bytes()))


def _lazy_table(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Yield the entries of a package's ``_import_structure``: from a literal, an item, extend or append."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and _is_structure(node.targets[0]) and isinstance(node.value, ast.Dict):
            for key, value in zip(node.value.keys, node.value.values, strict=True):
                yield from ((name, _text(key)) for name in _strings(value))
        elif isinstance(node, ast.Assign) and _is_structure_item(node.targets[0]):
            yield from ((name, _part(node.targets[0])) for name in _strings(node.value))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
            if _is_structure_item(node.func.value):
                yield from ((name, _part(node.func.value)) for name in _strings(node.args[0]))


def _is_structure(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id == "_import_structure"


def _is_structure_item(node: ast.expr) -> bool:
    return isinstance(node, ast.Subscript) and _is_structure(node.value)


def _part(node: ast.expr) -> str:
    return _text(node.slice) if isinstance(node, ast.Subscript) else ""


def _stage_classes() -> Iterator[tuple[str, str]]:
    """Read which diffusers classes multi-stage pipelines are known by, from the keywords of their declarations."""
    for file in sorted((_root("vllm_omni") / "model_executor" / "models").glob("*/pipeline.py")):
        source = file.read_bytes()
        if b"diffusers_class_name=" not in source:
            continue
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Call):
                given = {keyword.arg: keyword.value for keyword in node.keywords}
                names = [given[word] for word in ("diffusers_class_name", "diffusers_class_aliases") if word in given]
                yield from ((name, _text(given.get("model_type"))) for value in names for name in _strings(value))


def _root_config_rules(tree: ast.Module) -> tuple[dict[str, str], dict[str, str]]:
    """Read which pipeline vLLM-Omni takes for a root ``config.json`` without an index.

    ``resolve_model_class_name`` says so in statements of the form ``if model_type == "x" or "Y" in architectures:
    return "Pipeline"``; other decisions (that read further files) are not covered.
    """
    found = [node for node in tree.body if getattr(node, "name", "") == "resolve_model_class_name"]
    if not found:
        _changed("vllm_omni", "diffusion/data.py", "resolve_model_class_name")
    by_type: dict[str, str] = {}
    by_architecture: dict[str, str] = {}
    for node in ast.walk(found[0]):
        if not isinstance(node, ast.If) or not isinstance(node.body[-1], ast.Return):
            continue
        target = _text(node.body[-1].value)
        for compare in (part for part in ast.walk(node.test) if target and isinstance(part, ast.Compare)):
            by_type |= dict.fromkeys(_compared(compare, "model_type"), target)
            by_architecture |= dict.fromkeys(_compared(compare, "architectures"), target)
    return by_type, by_architecture


def _compared(compare: ast.Compare, name: str) -> list[str]:
    """Return the strings that a comparison compares with the variable ``name``."""
    sides = [compare.left, *compare.comparators]
    if not any(isinstance(side, ast.Name) and side.id == name for side in sides):
        return []
    return [text for side in sides for text in _strings(side)]


def _table(package: str, file: str, name: str) -> list[tuple[ast.expr | None, ast.expr]]:
    """Return the items of a module-level dict literal."""
    for node in _parse(package, file).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        value = getattr(node, "value", None)
        if isinstance(value, ast.Dict) and any(isinstance(item, ast.Name) and item.id == name for item in targets):
            return list(zip(value.keys, value.values, strict=True))
    _changed(package, file, name)


def _text(node: ast.expr | None) -> str:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def _strings(node: ast.expr) -> list[str]:
    """String constants of a list, tuple or single constant."""
    items = node.elts if isinstance(node, (ast.List, ast.Tuple)) else [node]
    return [text for item in items if (text := _text(item))]


@cache
def _parse(package: str, file: str) -> ast.Module:
    path = _root(package) / file
    if not path.is_file():
        _changed(package, file, "the file")
    return ast.parse(path.read_bytes())


@cache
def _root(package: str) -> Path:
    """Return a package's folder without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise OptionalDependencyError(
            f"{package} is not installed; which classes it has decides what this model is", hint=_INSTALL
        )
    return Path(spec.origin).parent


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "(version unknown)"


def _changed(package: str, file: str, name: str) -> NoReturn:
    raise RegistrationError(
        f"{package}/{file} has no {name} that can be read",
        code="upstream_changed",
        hint="the installed version differs from the one that port-kit knows: run port-kit doctor",
    )
