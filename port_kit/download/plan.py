"""Everything that can be known before the first large byte: files, sizes, hashes, gates, disk, collisions."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from port_kit.download.assemble import plan_written
from port_kit.download.hub import HubClient, HubFile
from port_kit.download.lock import LOCK_NAME, MODEL_INDEX, Lock, LockedFile
from port_kit.download.parts import FileSpec, resumable_bytes
from port_kit.download.paths import check_relative_path, folded_name, foreign_target, require_place
from port_kit.download.progress import human
from port_kit.download.recipe import FileRule, Recipe, Repository
from port_kit.download.state import is_behind_link
from port_kit.errors import DownloadError
from port_kit.escape import quoted
from port_kit.files import digests_of, free_space

_MARGIN = 1 << 20


@dataclass(frozen=True)
class Plan:
    """The work of a run.

    Attributes:
        recipe: the recipe.
        directory: the model directory.
        lock: the future ``port.lock``; files that exist already have their size and hash.
        fetch: the missing files.
        resumed: source bytes of these that earlier runs have left.
        disk_free: free bytes on the directory's disk.
        notes: messages for the user (moved branches).
    """

    recipe: Recipe
    directory: Path
    lock: Lock
    fetch: tuple[FileSpec, ...]
    resumed: int
    disk_free: int
    notes: tuple[str, ...] = field(default=())

    @property
    def bytes_to_fetch(self) -> int:
        """Source bytes to receive over the network, without files converted from a kept original."""
        remote = [item for item in self.fetch if not item.convert or original_of(item).target not in self.lock.files]
        return sum(spec.size for spec in remote) - self.resumed

    @property
    def disk_needed(self) -> int:
        """Bytes that the disk must have: one copy of each file, converted ones included, and a little for the rest."""
        return sum(spec.size for spec in self.fetch) - self.resumed + _MARGIN if self.fetch else 0

    def to_json(self) -> dict[str, Any]:
        """Return the plain form, for ``--dry-run --json``."""
        missing = {spec.target for spec in self.fetch}
        files = [{**item.spec.to_json(), "present": target not in missing} for target, item in self.lock.files.items()]
        return {
            "recipe": self.recipe.name,
            "directory": str(self.directory),
            "revisions": self.lock.revisions,
            "unconfirmed": self.lock.unconfirmed,
            "licences": {item.repo_id: item.licence for item in self.recipe.repositories if item.licence},
            "gated": [item.repo_id for item in self.recipe.repositories if item.gated],
            "files": files,
            "code": self.lock.code,
            "bytes_total": sum(item.spec.size for item in self.lock.files.values()),
            "bytes_to_fetch": self.bytes_to_fetch,
            "disk_needed": self.disk_needed,
            "disk_free": self.disk_free,
            "notes": list(self.notes),
        }

    def describe(self) -> str:
        """Return the plan as a table."""
        missing = {spec.target for spec in self.fetch}
        rows = [
            (human(item.spec.size), target, "" if target in missing else "present", _origin(item.spec))
            for target, item in self.lock.files.items()
        ]
        sizes, targets, states = (max((len(row[column]) for row in rows), default=0) for column in range(3))
        lines = [
            f"{size:>{sizes}}  {target:<{targets}}  " + (f"{state:<{states}}  " if states else "") + origin
            for size, target, state, origin in rows
        ]
        for item in self.recipe.repositories:
            mark = "  (not pinned by the recipe: fixed in port.lock)" if item.revision is None else ""
            licence = f"  licence: {item.licence}" if item.licence else ""
            gate = "  (its terms must be accepted on the Hub)" if item.gated else ""
            lines.append(f"{item.repo_id} at {self.lock.revisions[item.repo_id]}{mark}{licence}{gate}")
        lines += [f"code {name}: {code['url']} at {code['commit']}" for name, code in self.lock.code.items()]
        lines += self.notes
        lines.append(
            f"{human(self.bytes_to_fetch)} to fetch, {human(self.disk_needed)} of disk needed, "
            f"{human(self.disk_free)} free at {self.directory}"
        )
        return "\n".join(lines)


def _origin(spec: FileSpec) -> str:
    return f"{spec.repo_id}:{spec.path}" + (" (converted)" if spec.convert else "")


def make_plan(
    recipe: Recipe,
    directory: Path,
    hub: HubClient,
    known: Lock | None,
    *,
    update: bool,
    keep_original: bool,
    exclusive: bool,
) -> Plan:
    """Compare the recipe with the Hub and the disk.

    Args:
        directory: the model directory, which need not exist.
        known: its lock, if it has one.
        update: resolve unconfirmed revisions anew instead of taking the lock's.
        keep_original: plan pickle checkpoints as they are (under ``original/``), to be converted on disk.
        exclusive: the directory's lock keeps other hosts out; see :func:`~port_kit.download.parts.acquire`.

    Raises:
        DownloadError: anything that would fail later.
    """
    known = known or Lock(recipe.name, "", {})
    written = plan_written(directory, recipe, known)
    notes: list[str] = []
    lock = dataclasses.replace(known)
    if update or known.fingerprint != recipe.fingerprint() or (keep_original and not has_originals(known)):
        lock, notes = _resolve(recipe, hub, known.revisions, update, keep_original)
    _check_targets(recipe, lock)
    lock.written, lock.code = written, dict(known.code)
    lock.files = {target: _present(directory, item, known.files.get(target)) for target, item in lock.files.items()}
    fetch = tuple(item.spec for item in lock.files.values() if item.sha256 is None)
    for repo_id in dict.fromkeys(spec.repo_id for spec in fetch):
        hub.probe(max((spec for spec in fetch if spec.repo_id == repo_id), key=lambda spec: spec.size))
    resumed = sum(resumable_bytes(directory, spec, exclusive=exclusive) for spec in fetch)
    plan = Plan(recipe, directory, lock, fetch, resumed, free_space(directory), tuple(notes))
    _check_disk(plan)
    return plan


def _resolve(
    recipe: Recipe, hub: HubClient, fixed: dict[str, str], update: bool, keep_original: bool
) -> tuple[Lock, list[str]]:
    """Query revisions and files; note branches that have moved since the lock was written."""
    lock, notes = Lock(recipe.name, recipe.fingerprint(), {}), []
    for repository in recipe.repositories:
        repo_id = repository.repo_id
        commit = repository.revision
        if commit is None:
            lock.unconfirmed.append(repo_id)
            commit = None if update else fixed.get(repo_id)
            commit = commit or hub.resolve(repo_id, repository.branch)
            if repo_id in fixed and fixed[repo_id] != commit:
                notes.append(f"{repo_id}: {repository.branch} has moved from {fixed[repo_id]} to {commit}")
        lock.revisions[repo_id] = commit
        for spec in _select(repository, commit, hub.tree(repo_id, commit), keep_original):
            if other := lock.files.get(spec.target):
                raise _collision(f"{_origin(other.spec)} and {_origin(spec)} both go to {spec.target}")
            lock.files[spec.target] = LockedFile(spec)
    return lock, notes


def _collision(message: str) -> DownloadError:
    return DownloadError(message, code="target_collision", hint="give one of them another folder or name in the recipe")


def _select(repository: Repository, commit: str, files: list[HubFile], keep_original: bool) -> Iterable[FileSpec]:
    """Yield the selected files; a converted file follows its original if that is kept."""
    for rule in repository.files:
        matched = [file for file in files if file.path == rule.pattern]
        if rule.is_glob and not matched:
            matched = [file for file in files if fnmatch.fnmatchcase(file.path, rule.pattern)]
        _check_matches(repository, commit, rule, matched, files)
        for file in matched:
            wanted = _spec(repository.repo_id, commit, rule, file)
            if keep_original and rule.convert:
                yield original_of(wanted)
            yield wanted


def _check_matches(
    repository: Repository, commit: str, rule: FileRule, matched: list[HubFile], files: list[HubFile]
) -> None:
    where = f"{repository.repo_id} at {commit}"
    if not matched:
        import difflib

        near = difflib.get_close_matches(rule.pattern, [file.path for file in files], n=3)
        raise DownloadError(
            f"the pattern {quoted(rule.pattern)} matches none of the {len(files)} files of {where}",
            code="pattern_empty",
            hint=f"did you mean {', '.join(near)}?" if near else "correct the recipe",
        )
    if (rule.name or rule.sha256) and len(matched) > 1:
        only = rule.name or f"the one of sha256 {rule.sha256}"
        raise DownloadError(
            f"the pattern {quoted(rule.pattern)} matches {len(matched)} files of {where}, which cannot all be {only}",
            code="target_collision",
            hint="leave out name and sha256, or narrow the pattern",
        )
    stated = matched[0].sha256
    if rule.sha256 and stated and rule.sha256 != stated:
        raise DownloadError(
            f"{where} states sha256 {stated} for {matched[0].path}, the recipe requires {rule.sha256}",
            code="hash_mismatch",
            hint="the file is not the one that the recipe was written for",
        )


def _spec(repo_id: str, commit: str, rule: FileRule, file: HubFile) -> FileSpec:
    check_relative_path(file.path, repo_id)
    target = rule.target(file.path)
    check_relative_path(target, f"the rule {quoted(rule.pattern)} of {repo_id}")
    digest = f"sha256:{rule.sha256}" if rule.sha256 else file.digest
    return FileSpec(target, repo_id, commit, file.path, file.size, digest, rule.convert, rule.wrapper, rule.drop)


def original_of(spec: FileSpec) -> FileSpec:
    """Return the pickle checkpoint that a converted file comes from, as ``--keep-original`` keeps it."""
    target = f"original/{spec.repo_id}/{spec.path}"
    return dataclasses.replace(spec, target=target, convert=False, wrapper="", drop=())


def has_originals(lock: Lock) -> bool:
    """Return True if a lock was made with ``--keep-original``, and something is converted."""
    return any(original_of(item.spec).target in lock.files for item in lock.files.values() if item.spec.convert)


def _check_targets(recipe: Recipe, lock: Lock) -> None:
    """Refuse targets that some system takes for one, a target that is a folder of another, and git repositories."""
    own = {MODEL_INDEX, LOCK_NAME, *(f"{folder}/config.json" for folder in recipe.configs)}
    for folder in recipe.configs:
        check_relative_path(f"{folder}/config.json", f"recipe {recipe.name}")
    files: dict[str, str] = {}
    folders: dict[str, str] = {}
    for target in [*own, *lock.files]:
        folded = folded_name(target)
        above = [str(parent) for parent in PurePosixPath(folded).parents][:-1]
        taken = next((files[place] for place in (folded, *above) if place in files), folders.get(folded))
        if taken is not None:
            raise _collision(f"{target} collides with {taken}")
        files[folded] = target
        for folder in above:
            folders.setdefault(folder, f"{target} (a folder)")
    for folder in ("", *(f"{place}/" for place in folders)):
        if f"{folder}head" in files and {f"{folder}objects", f"{folder}refs"} <= folders.keys():
            check_relative_path(f"{folder}.git", f"the bare git repository {folder or '.'} in recipe {recipe.name}")


def _present(directory: Path, item: LockedFile, known: LockedFile | None) -> LockedFile:
    """Return an item of the lock with its state in the directory.

    A file that is finished has its size and hash: with the lock's size, or with the right hash if no lock vouches for
    it. A file that the kit created and that is another one is to be replaced; so is one that is missing.
    """
    path, missing = directory / item.spec.target, LockedFile(item.spec)
    require_place(path)
    if not path.is_file():
        return missing
    if known is not None and known.sha256 is not None:
        same = known.spec == item.spec and path.stat().st_size == known.size
        if same and (known.verified or digests_of(path, git=False)["sha256"] == known.sha256):
            return dataclasses.replace(known, verified=True)
        if not known.adopted and not is_behind_link(directory, item.spec.target):
            return missing
    return _adopt(path, item)


def _adopt(path: Path, item: LockedFile) -> LockedFile:
    """Take a file that the kit did not create if its hash is right; it is never overwritten otherwise."""
    kind, _, value = item.spec.digest.partition(":")
    if not item.spec.convert and path.stat().st_size == item.spec.size:
        digests = digests_of(path, git=kind == "git")
        if digests[kind] == value:
            return LockedFile(item.spec, item.spec.size, digests["sha256"], adopted=True)
    raise foreign_target(
        f"{path} was not put there by port-kit, or lies behind a linked folder, and is not {_origin(item.spec)}"
    )


def _check_disk(plan: Plan) -> None:
    if plan.disk_needed > plan.disk_free:
        raise DownloadError(
            f"{human(plan.disk_needed)} are needed at {plan.directory}, {human(plan.disk_free)} are free",
            code="disk_full",
            hint="free some space or choose another --output-dir; nothing was fetched",
            needed=plan.disk_needed,
            free=plan.disk_free,
        )
