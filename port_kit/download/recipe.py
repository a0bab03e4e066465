"""Recipes: the files of a model directory and their sources, as data.

A :class:`Recipe` is a frozen dataclass or a TOML file with the same fields::

    name = "my_model"
    model_index = { _class_name = "MyPipeline", _diffusers_version = "0.40.0" }
    configs.transformer = { num_layers = 30 }

    [[repositories]]
    repo_id = "org/model"
    revision = "0123456789abcdef0123456789abcdef01234567"
    files = [
        { pattern = "model.safetensors", folder = "transformer" },
        { pattern = "vae.pth", folder = "vae", name = "model.safetensors", convert = true, wrapper = "generator" },
    ]

    [[code]]
    name = "my_reference"
    url = "https://github.com/org/model"
    commit = "89abcdef0123456789abcdef0123456789abcdef"
    packages = ["my_model"]

A revision or commit that is left out is *unconfirmed*: it is resolved at the first run and written into ``port.lock``,
and every later run uses the lock.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import keyword
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from port_kit.errors import DownloadError
from port_kit.escape import quoted, reason_of
from port_kit.files import read_text

FULL_HASH = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_REPO_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
NAME = re.compile(r"[A-Za-z_][\w.-]*", re.ASCII)

_T = TypeVar("_T")


@dataclass(frozen=True)
class FileRule:
    """A choice of files of a repository, and their place in the model directory.

    Attributes:
        pattern: a path in the repository, or a shell pattern (``*`` crosses folders); it must match at least one file.
        folder: the folder in the model directory, a component's name; empty for the root.
        name: the file's name there. Empty keeps the path below the pattern's fixed folder, with the suffix
            ``.safetensors`` for converted files. Only for a pattern that matches exactly one file.
        convert: a pickle checkpoint that becomes a safetensors file: the same names, another container.
        wrapper: the keys above the tensors in the pickle, dotted (``generator``, ``app.model``); needs ``convert``.
        drop: names beside the tensors that are left out on purpose (``epoch``); needs ``convert``.
        sha256: the hash that this file must have; empty if only the Hub states one.
    """

    pattern: str
    folder: str = ""
    name: str = ""
    convert: bool = False
    wrapper: str = ""
    sha256: str = ""
    drop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _require(bool(self.pattern), "a file rule needs a pattern")
        _require(
            self.convert or not self.wrapper, f"{self.pattern}: wrapper {quoted(self.wrapper)} needs convert = true"
        )
        _require(self.convert or not self.drop, f"{self.pattern}: drop needs convert = true")
        _require(not self.sha256 or bool(_SHA256.fullmatch(self.sha256)), f"{self.pattern}: sha256 is 64 hex digits")

    @property
    def is_glob(self) -> bool:
        """Return True if the pattern can match more than one file."""
        return any(character in self.pattern for character in "*?[")

    def target(self, path: str) -> str:
        """Return the target of the repository's file ``path``, relative to the model directory, with ``/``."""
        name = self.name or self._kept_name(path)
        return f"{self.folder}/{name}" if self.folder else name

    def _kept_name(self, path: str) -> str:
        fixed = re.split(r"[*?\[]", self.pattern, maxsplit=1)[0].rpartition("/")[0]
        name = path[len(fixed) + 1 :] if fixed and self.is_glob else path
        name = name if self.is_glob else name.rpartition("/")[2]
        if self.convert:
            stem, dot, _ = name.rpartition(".")
            return f"{stem if dot else name}.safetensors"
        return name


@dataclass(frozen=True)
class Repository:
    """One Hub repository of a recipe.

    Attributes:
        repo_id: ``organisation/name``.
        files: its selected files.
        revision: the full commit, 40 hex digits; None if it has not been confirmed yet (see the module's text).
        branch: branch that resolves an unconfirmed revision.
        licence: permitted use of its files, one line.
        gated: whether its licence must be accepted on the Hub before its files can be had.
    """

    repo_id: str
    files: tuple[FileRule, ...]
    revision: str | None = None
    branch: str = "main"
    licence: str = ""
    gated: bool = False

    def __post_init__(self) -> None:
        _require(
            bool(_REPO_ID.fullmatch(self.repo_id)), f"repository id {quoted(self.repo_id)} is not organisation/name"
        )
        _require(bool(self.files), f"{self.repo_id} names no files")
        _require(bool(self.branch), f"{self.repo_id} has an empty branch")
        _check_hash(self.revision, f"revision of {self.repo_id}")


@dataclass(frozen=True)
class GitCode:
    """The original code of a model, for comparison; fetched with ``--with-reference`` only.

    Attributes:
        name: names its folder and its ``.pth`` file in site-packages.
        url: ``https://``, ``ssh://`` or ``file://``.
        commit: 40 hex digits; None if unconfirmed (then ``branch`` is resolved at the first run).
        packages: the top-level modules or packages that become importable; no other name of the repository does.
        path: the folder in the repository that holds them.
        branch: branch that resolves an unconfirmed commit.
        licence: permitted use of the code, one line.
    """

    name: str
    url: str
    packages: tuple[str, ...]
    commit: str | None = None
    path: str = ""
    branch: str = "HEAD"
    licence: str = ""

    def __post_init__(self) -> None:
        _require(bool(NAME.fullmatch(self.name)), f"name of git code {quoted(self.name)} is not a plain name")
        _require(bool(self.packages), f"git code {self.name} names no packages")
        for package in self.packages:
            plain = package.isidentifier() and not keyword.iskeyword(package)
            _require(plain, f"git code {self.name}: {quoted(package)} is not a module's name")
        inside = not self.path or not {"", ".", ".."} & set(self.path.split("/"))
        _require(inside, f"git code {self.name}: path {quoted(self.path)} is not a folder in its repository")
        _check_hash(self.commit, f"commit of {self.name}")


@dataclass(frozen=True)
class Recipe:
    """Everything that a model directory is assembled from.

    Attributes:
        name: the port's name.
        repositories: the Hub's repositories, in the order of the recipe.
        model_index: the content of ``model_index.json``; needs ``_class_name`` and ``_diffusers_version``.
        configs: ``{folder: content of folder/config.json}``.
        code: the original code, for ``--with-reference``.
    """

    name: str
    repositories: tuple[Repository, ...]
    model_index: Mapping[str, Any]
    configs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    code: tuple[GitCode, ...] = ()

    def __post_init__(self) -> None:
        _require(bool(NAME.fullmatch(self.name)), f"recipe name {quoted(self.name)} is not a plain name")
        _require(bool(self.repositories), f"recipe {self.name} names no repositories")
        ids = [repository.repo_id for repository in self.repositories]
        _require(len(set(ids)) == len(ids), f"recipe {self.name} names a repository twice")
        names = [code.name for code in self.code]
        _require(len(set(names)) == len(names), f"recipe {self.name} names git code twice")
        for place, content in {"model_index": self.model_index, **self.configs}.items():
            _require(isinstance(content, Mapping), f"recipe {self.name}: {place} is no table")
            _require_json(content, f"recipe {self.name}: {place}")
        stated = {key for key, value in self.model_index.items() if isinstance(value, str) and value}
        missing = [key for key in ("_class_name", "_diffusers_version") if key not in stated]
        _require(not missing, f"model_index of {self.name} lacks {' and '.join(missing)}, which vLLM-Omni looks for")

    @property
    def licences(self) -> dict[str, str]:
        """Licenses by folder of the model directory, and of the git code by its name."""
        weights = {rule.folder: item.licence for item in self.repositories for rule in item.files if item.licence}
        return weights | {code.name: code.licence for code in self.code if code.licence}

    def with_(
        self,
        *,
        configs: Mapping[str, Mapping[str, Any]] | None = None,
        model_index: Mapping[str, Any] | None = None,
        revisions: Mapping[str, str | None] | None = None,
        code: tuple[GitCode, ...] | None = None,
    ) -> Recipe:
        """Return this recipe for other content: another size of the model, a mirror, a test's repositories.

        Args:
            configs: contents that replace those of the same folders.
            model_index: keys that replace or extend those of ``model_index.json``.
            revisions: ``{repo_id: 40 hex digits, or None to resolve it}``; pinned file hashes of these
                repositories are left behind with their revisions.
            code: the git code instead of the recipe's.
        """
        revisions = revisions or {}
        unknown = set(revisions) - {repository.repo_id for repository in self.repositories}
        _require(not unknown, f"recipe {self.name} has no repository {', '.join(sorted(unknown))}")
        repositories = (
            _at_revision(item, revisions[item.repo_id]) if item.repo_id in revisions else item
            for item in self.repositories
        )
        return dataclasses.replace(
            self,
            repositories=tuple(repositories),
            configs={**self.configs, **(configs or {})},
            model_index={**self.model_index, **(model_index or {})},
            code=self.code if code is None else code,
        )

    def fingerprint(self) -> str:
        """Return a hash over all fields: a lock that was written for another recipe is recognised by it."""
        fields = dataclasses.asdict(self)
        for rule in (rule for repository in fields["repositories"] for rule in repository["files"]):
            if not rule["drop"]:
                del rule["drop"]  # as before there was this field: locks of that time stay valid
        canonical = json.dumps(fields, sort_keys=True, separators=(",", ":"), default=plain)
        return hashlib.sha256(canonical.encode()).hexdigest()

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        """Build a recipe from plain data (parsed TOML or JSON); unknown and missing fields are errors."""
        return _build(cls, data)

    @classmethod
    def from_toml(cls, path: str | Path) -> Recipe:
        """Read a recipe from a TOML file; errors name the file."""
        try:
            data = tomllib.loads(read_text(Path(path), "utf-8-sig"))
        except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise DownloadError(
                f"cannot read the recipe {path}: {reason_of(error)}",
                code="recipe_invalid",
                hint="correct the file, or its path",
            ) from error
        try:
            return cls.from_dict(data)
        except DownloadError as error:
            raise DownloadError(f"{path}: {error.message}", code=error.code, hint=error.hint) from error


def _at_revision(repository: Repository, revision: str | None) -> Repository:
    files = tuple(dataclasses.replace(rule, sha256="") for rule in repository.files)
    return dataclasses.replace(repository, revision=revision, files=files)


def _build(cls: type[_T], data: Mapping[str, Any]) -> _T:
    """Call a dataclass with fields from a file; lists become tuples, tables dataclasses, and errors name the field."""
    fields = {item.name: item for item in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = set(data) - set(fields)
    _require(not unknown, f"{cls.__name__} has no field {', '.join(sorted(unknown))}; it has {', '.join(fields)}")
    missing = [
        name
        for name, item in fields.items()
        if name not in data and item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
    ]
    _require(not missing, f"{cls.__name__} needs {', '.join(missing)}")
    kinds = get_type_hints(cls)
    values = {key: _converted(value, kinds[key]) for key, value in data.items()}
    for key, value in values.items():
        required = f"{cls.__name__}: {key} is {quoted(str(data[key]))}; {fields[key].type} is required"
        _require(_is_of_kind(value, kinds[key]), required)
    return cls(**values)


def _converted(value: object, kind: Any) -> object:
    """Return a value as its field has it, if it can be that: a tuple for a list, a dataclass for a table."""
    if isinstance(value, (list, tuple)) and get_origin(kind) is tuple:
        return tuple(_converted(item, get_args(kind)[0]) for item in value)
    if isinstance(value, Mapping) and isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return _build(kind, value)
    return value


def _is_of_kind(value: object, kind: Any) -> bool:
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(isinstance(item, get_args(kind)[0]) for item in value)
    return isinstance(value, get_origin(kind) if get_origin(kind) is Mapping else kind)


def _require_json(value: object, what: str) -> None:
    try:
        json.dumps(value, allow_nan=False, default=plain)
    except (TypeError, ValueError, RecursionError) as error:
        raise DownloadError(
            f"{what} cannot be written as JSON: {reason_of(error)}", code="recipe_invalid", hint="correct the recipe"
        ) from error


def plain(value: object) -> object:
    """Mappings and sequences of other kinds than dict and list, for ``json.dumps``."""
    return dict(value) if isinstance(value, Mapping) else list(value)  # type: ignore[call-overload]


def _check_hash(value: str | None, what: str) -> None:
    valid = value is None or FULL_HASH.fullmatch(value) is not None
    _require(valid, f"{what} is {quoted(value)}; it must be 40 hex digits, or left out where it is not known yet")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise DownloadError(message, code="recipe_invalid", hint="correct the recipe")
