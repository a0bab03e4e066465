"""``port.lock``: the exact sources of a model directory; its journal; and their verification.

The lock is written when the plan is made (``complete: false``): from then on unconfirmed revisions are fixed. Each
finished file adds a line to ``.port_kit/journal`` before it gets its name. The line counts for a file of the same
specification only, and is believed after its hash was checked. At the end the journal goes into the lock. A directory
is compared with its lock by size on every run, by hash on request.
"""

from __future__ import annotations

import dataclasses
import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from port_kit.download.http import Interrupted
from port_kit.download.parts import FileSpec
from port_kit.download.paths import check_relative_path
from port_kit.download.state import open_state_file, state_path
from port_kit.errors import DownloadError
from port_kit.escape import reason_of
from port_kit.files import digests_of, os_errors_as, read_json, write_json

LOCK_NAME = "port.lock"
MODEL_INDEX = "model_index.json"
_SCHEMA = "port-kit-lock/1"
_HASHERS = 4


@dataclass(frozen=True)
class LockedFile:
    """A file of the model directory.

    Attributes:
        spec: its source and hash.
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
        complete: True if the directory was complete when the lock was written.
    """

    recipe: str
    fingerprint: str
    revisions: dict[str, str]
    unconfirmed: list[str] = field(default_factory=list)
    files: dict[str, LockedFile] = field(default_factory=dict)
    written: dict[str, dict[str, Any]] = field(default_factory=dict)
    code: dict[str, dict[str, str]] = field(default_factory=dict)
    complete: bool = False

    def created(self) -> set[str]:
        """Return the finished files that the kit created, and may delete."""
        files = {target for target, item in self.files.items() if not item.adopted and item.sha256}
        return files | {target for target, item in self.written.items() if not item.get("adopted")}

    def contents(self) -> Iterator[tuple[str, int, str]]:
        """Yield ``(target, size, sha256)`` of all finished files."""
        for target, item in self.files.items():
            if item.size is not None and item.sha256 is not None:
                yield target, item.size, item.sha256
        for target, written in self.written.items():
            yield target, written["size"], written["sha256"]

    def to_json(self) -> dict[str, Any]:
        """Return the plain form."""
        files = {}
        for target, item in sorted(self.files.items()):
            stated = {"final_size": item.size, "final_sha256": item.sha256, "adopted": item.adopted}
            files[target] = {**item.spec.to_json(), **stated}
            del files[target]["target"]
        return {"schema": _SCHEMA, **dataclasses.asdict(self), "files": files}

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
    """Return the directory's lock with the entries of its journal; None if there is none.

    Raises:
        DownloadError: ``lock_invalid``.
    """
    path = directory / LOCK_NAME
    data = read_json(path)
    if data is None and not path.exists():
        return None
    try:
        if data["schema"] != _SCHEMA:
            raise ValueError(f"schema {data['schema']}, {_SCHEMA} is required")
        lock = Lock.from_json(data)
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise DownloadError(
            f"{path} cannot be read ({type(error).__name__}: {reason_of(error)})",
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


def has_size(path: Path, size: int | None) -> bool:
    """Return True if there is a file of this size; reads no content."""
    return path.is_file() and path.stat().st_size == size


def is_whole(directory: Path, lock: Lock, fingerprint: str) -> bool:
    """Return True if a run for the recipe with this fingerprint is up to date; compares sizes only."""
    finished = lock.complete and all(item.sha256 for item in lock.files.values())
    if not finished or lock.fingerprint != fingerprint or not (directory / MODEL_INDEX).is_file():
        return False
    return all(has_size(directory / target, size) for target, size, _ in lock.contents())


def damaged_files(directory: Path, lock: Lock, advance: Callable[[int], None]) -> dict[str, str]:
    """Hash all files of the lock; return ``{target: problem}``."""

    def examine(item: tuple[str, int, str]) -> tuple[str, str]:
        target, size, sha256 = item
        path = directory / target
        if not path.is_file():
            return target, "missing"
        if path.stat().st_size != size:
            return target, f"{path.stat().st_size} bytes instead of {size}"
        try:
            found = digests_of(path, git=False, advance=counted)["sha256"]
        except OSError as error:
            return target, f"cannot be read: {error.strerror}"
        return target, "" if found == sha256 else f"sha256 {found} instead of {sha256}"

    def counted(count: int) -> None:
        if stopped.is_set():
            raise Interrupted
        advance(count)

    stopped = threading.Event()
    with ThreadPoolExecutor(_HASHERS) as pool:
        try:
            return {target: problem for target, problem in pool.map(examine, lock.contents()) if problem}
        except BaseException:
            stopped.set()  # the pool waits for its threads, and a large file takes a minute
            raise
