"""``port.lock``: what a model directory was made from, to the byte; and the journal that becomes it.

The lock is written when the plan is made (``complete: false``): from then on unconfirmed revisions are fixed. Each
finished file adds a line to ``.port_kit/journal`` before it gets its name. The line counts for a file of the same
specification only, and is believed after its hash was checked. At the end the journal goes into the lock.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from port_kit.download.parts import FileSpec
from port_kit.download.paths import check_relative_path
from port_kit.download.state import open_state_file, state_path
from port_kit.errors import DownloadError
from port_kit.files import os_errors_as, read_json, write_json

LOCK_NAME = "port.lock"
SCHEMA = "port-kit-lock/1"


@dataclass(frozen=True)
class LockedFile:
    """A file of the model directory.

    Attributes:
        spec: what it is and where it comes from.
        size, sha256: of the finished file; None until then.
        adopted: it was there before, with the right hash; the kit did not create it and does not delete it.
        verified: False if only the journal states its hash.
    """

    spec: FileSpec
    size: int | None = None
    sha256: str | None = None
    adopted: bool = False
    verified: bool = True


@dataclass
class Lock:
    """The content of ``port.lock``.

    Attributes:
        recipe: the port's name.
        fingerprint: of the recipe that the plan was made for.
        revisions: ``{repo_id: commit}`` as used.
        unconfirmed: those of them that the recipe does not pin.
        files: by target.
        written: ``{target: {"size", "sha256", "adopted"}}`` of the files that the recipe contains itself.
        code: ``{name: {"url", "commit"}}`` of the git code as used.
        complete: whether the directory was whole when this was written.
    """

    recipe: str
    fingerprint: str
    revisions: dict[str, str]
    unconfirmed: list[str] = field(default_factory=list)
    files: dict[str, LockedFile] = field(default_factory=dict)
    written: dict[str, dict[str, Any]] = field(default_factory=dict)
    code: dict[str, dict[str, str]] = field(default_factory=dict)
    complete: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return the plain form."""
        files = {
            target: {
                **{key: value for key, value in item.spec.to_json().items() if key != "target"},
                "final_size": item.size,
                "final_sha256": item.sha256,
                "adopted": item.adopted,
            }
            for target, item in sorted(self.files.items())
        }
        return {"schema": SCHEMA, **dataclasses.asdict(self), "files": files}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Lock:
        """Build a lock from its plain form."""
        files = {}
        for target, item in data["files"].items():
            item = dict(item)
            size, sha256, adopted = item.pop("final_size"), item.pop("final_sha256"), item.pop("adopted", False)
            check_relative_path(target, LOCK_NAME)
            spec = FileSpec(target=target, **{**item, "drop": tuple(item.get("drop", ()))})
            _require_kinds(spec, size, sha256)
            if not spec.convert and spec.digest.startswith("sha256:") and spec.digest != f"sha256:{sha256}":
                size = sha256 = None  # no statement of this file
            files[target] = LockedFile(spec, size, sha256, adopted=adopted is True)
        for target, item in data["written"].items():
            check_relative_path(target, LOCK_NAME)
            _require(isinstance(item["size"], int) and isinstance(item["sha256"], str), target)
        _require(all(isinstance(item["commit"], str) for item in data["code"].values()), "code")
        _require(all(isinstance(commit, str) for commit in data["revisions"].values()), "revisions")
        _require(isinstance(data["unconfirmed"], list) and isinstance(data["complete"], bool), "its fields")
        fields = {key: value for key, value in data.items() if key not in ("schema", "files")}
        return cls(files=files, **fields)

    def save(self, directory: Path) -> None:
        """Write it, durably."""
        write_json(directory / LOCK_NAME, self.to_json())


def _require_kinds(spec: FileSpec, size: object, sha256: object) -> None:
    numbers = isinstance(spec.size, int) and isinstance(size, (int, type(None)))
    texts = (spec.repo_id, spec.commit, spec.path, spec.digest, spec.wrapper, *spec.drop)
    whole = numbers and all(isinstance(text, str) for text in texts) and isinstance(sha256, (str, type(None)))
    _require(whole and spec.commit != "" and (size is None) == (sha256 is None), spec.target)


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise ValueError(f"{what} is not as it was written")


def read_lock(directory: Path) -> Lock | None:
    """Return the directory's lock with what its journal adds; None if there is none.

    Raises:
        DownloadError: ``lock_invalid``.
    """
    path = directory / LOCK_NAME
    data = read_json(path)
    if data is None and not path.exists():
        return None
    try:
        if data["schema"] != SCHEMA:
            raise ValueError(f"schema {data['schema']}, {SCHEMA} is required")
        lock = Lock.from_json(data)
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise DownloadError(
            f"{path} cannot be read ({type(error).__name__}: {error})",
            code="lock_invalid",
            hint="delete it; the files beside it are recognised by their hashes, converted ones are made again",
        ) from error
    journal = _journal(directory)
    for target, item in lock.files.items():
        if item.sha256 is None and item.spec.key in journal:
            size, sha256 = journal[item.spec.key]
            lock.files[target] = dataclasses.replace(item, size=size, sha256=sha256, verified=False)
    return lock


def append_journal(directory: Path, spec: FileSpec, size: int, sha256: str) -> None:
    """Note, durably, that a file is finished and about to get its name."""
    path = state_path(directory) / "journal"
    line = json.dumps([spec.key, size, sha256]) + "\n"
    with os_errors_as(path):
        descriptor = open_state_file(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        try:
            os.write(descriptor, f"\n{line}".encode())  # a torn line before it must not swallow this one
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def drop_journal(directory: Path) -> None:
    """Delete the journal, once the lock has its content."""
    (state_path(directory) / "journal").unlink(missing_ok=True)


def _journal(directory: Path) -> dict[str, tuple[int, str]]:
    """Return ``{key of a specification: (size, sha256)}``."""
    try:
        lines = (state_path(directory) / "journal").read_text(encoding="utf-8", errors="replace").splitlines()
    except (FileNotFoundError, NotADirectoryError):
        return {}
    entries = {}
    for line in filter(None, lines):
        try:
            key, size, sha256 = json.loads(line)
        except (ValueError, TypeError, RecursionError):
            continue  # torn by a kill; its file has not been renamed yet
        if isinstance(key, str) and isinstance(size, int) and isinstance(sha256, str):
            entries[key] = (size, sha256)
    return entries
