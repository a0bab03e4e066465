"""Everything that can be known before the first large byte: files, sizes, hashes, gates, disk, collisions."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from port_kit.download.files import check_relative_path, digests_of, free_space, require_place
from port_kit.download.hub import HubClient, HubFile
from port_kit.download.lock import LOCK_NAME, Lock, LockedFile
from port_kit.download.parts import Identity, bytes_on_disk
from port_kit.download.progress import human
from port_kit.download.recipe import FileRule, Recipe, Repository
from port_kit.errors import DownloadError

MODEL_INDEX = "model_index.json"
ORIGINALS = "original"
_MARGIN = 1 << 20


@dataclass(frozen=True)
class Plan:
    """What a run will do.

    Attributes:
        recipe: what is wanted.
        directory: the model directory.
        lock: what will be written as ``port.lock``; files that are there already carry their size and hash.
        fetch: what is missing.
        resumed: source bytes of these that earlier runs have left.
        disk_free: bytes free where the directory lies.
        notes: what a person should know (moved branches, strangers).
    """

    recipe: Recipe
    directory: Path
    lock: Lock
    fetch: tuple[Identity, ...]
    resumed: int
    disk_free: int
    notes: tuple[str, ...] = field(default=())

    @property
    def bytes_to_fetch(self) -> int:
        """Source bytes that will come over the network; what is converted from a kept original does not."""
        targets = {identity.target for identity in self.lock_identities}
        remote = [item for item in self.fetch if not item.convert or original_of(item).target not in targets]
        return sum(identity.size for identity in remote) - self.resumed

    @property
    def lock_identities(self) -> tuple[Identity, ...]:
        """All files of the model directory that come from repositories."""
        return tuple(item.identity for item in self.lock.files.values())

    @property
    def licences(self) -> dict[str, str]:
        """What the recipe says of each repository's licence, where it says something."""
        return {item.repo_id: item.licence for item in self.recipe.repositories if item.licence}

    @property
    def gated(self) -> list[str]:
        """The repositories whose terms must be accepted on the Hub, as the recipe says."""
        return [item.repo_id for item in self.recipe.repositories if item.gated]

    @property
    def disk_needed(self) -> int:
        """Bytes that the disk must have: one copy of each file, converted ones included, and a little for the rest."""
        return sum(identity.size for identity in self.fetch) - self.resumed + _MARGIN if self.fetch else 0

    def to_json(self) -> dict[str, Any]:
        """Return the plain form, for ``--dry-run --json``."""
        missing = {identity.target for identity in self.fetch}
        files = [
            {**dataclasses.asdict(item.identity), "present": target not in missing}
            for target, item in self.lock.files.items()
        ]
        return {
            "recipe": self.recipe.name,
            "directory": str(self.directory),
            "revisions": self.lock.revisions,
            "unconfirmed": self.lock.unconfirmed,
            "licences": self.licences,
            "gated": self.gated,
            "files": files,
            "code": self.lock.code,
            "bytes_total": sum(item.identity.size for item in self.lock.files.values()),
            "bytes_to_fetch": self.bytes_to_fetch,
            "disk_needed": self.disk_needed,
            "disk_free": self.disk_free,
            "notes": list(self.notes),
        }

    def describe(self) -> str:
        """Return the table for people."""
        missing = {identity.target for identity in self.fetch}
        rows = [
            (human(item.identity.size), target, "" if target in missing else "present", _origin(item.identity))
            for target, item in self.lock.files.items()
        ]
        sizes, targets, states = (max((len(row[column]) for row in rows), default=0) for column in range(3))
        lines = [
            f"{size:>{sizes}}  {target:<{targets}}  " + (f"{state:<{states}}  " if states else "") + origin
            for size, target, state, origin in rows
        ]
        for repo_id, commit in self.lock.revisions.items():
            mark = "  (not pinned by the recipe: fixed in port.lock)" if repo_id in self.lock.unconfirmed else ""
            licence = self.licences.get(repo_id)
            terms = f"  licence: {licence}" if licence else ""
            terms += "  (its terms must be accepted on the Hub)" if repo_id in self.gated else ""
            lines.append(f"{repo_id} at {commit}{mark}{terms}")
        lines += [f"code {name}: {item['url']} at {item['commit']}" for name, item in self.lock.code.items()]
        lines += self.notes
        lines.append(
            f"{human(self.bytes_to_fetch)} to fetch, {human(self.disk_needed)} of disk needed, "
            f"{human(self.disk_free)} free at {self.directory}"
        )
        return "\n".join(lines)


def _origin(identity: Identity) -> str:
    return f"{identity.repo_id}:{identity.path}" + (" (converted)" if identity.convert else "")


def make_plan(
    recipe: Recipe,
    directory: Path,
    hub: HubClient,
    known: Lock | None,
    *,
    update: bool = False,
    keep_original: bool = False,
) -> Plan:
    """Ask the Hub and the disk what there is to do.

    Args:
        recipe: what is wanted.
        directory: the model directory, which need not exist.
        hub: where the repositories are.
        known: the directory's lock, if it has one.
        update: resolve unconfirmed revisions anew instead of taking the lock's.
        keep_original: plan pickle checkpoints as they are (under ``original/``), to be converted on disk.

    Raises:
        DownloadError: anything that would fail later.
    """
    known_files = known.files if known else {}
    fixed = known.revisions if known else {}
    same = known is not None and known.fingerprint == recipe.fingerprint() and not update
    notes: list[str]
    if known is not None and same and (_keeps_originals(known) or not keep_original):
        lock, notes = dataclasses.replace(known), []
    else:
        lock, notes = _resolve(recipe, hub, fixed, update, keep_original)
    _check_targets(recipe, lock)
    lock.files = {target: _present(directory, item, known_files.get(target)) for target, item in lock.files.items()}
    fetch = tuple(item.identity for item in lock.files.values() if item.sha256 is None)
    for repo_id in dict.fromkeys(identity.repo_id for identity in fetch):
        largest = max((item for item in fetch if item.repo_id == repo_id), key=lambda item: item.size)
        hub.probe(repo_id, largest.commit, largest.path)
    resumed = sum(bytes_on_disk(directory, identity) for identity in fetch)
    plan = Plan(recipe, directory, lock, fetch, resumed, free_space(directory), tuple(notes))
    _check_disk(plan)
    return plan


def _keeps_originals(lock: Lock) -> bool:
    return any(target.startswith(f"{ORIGINALS}/") for target in lock.files)


def _resolve(
    recipe: Recipe, hub: HubClient, fixed: dict[str, str], update: bool, keep_original: bool
) -> tuple[Lock, list[str]]:
    """Ask for revisions and files; say where a branch has moved since the lock was written."""
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
        for identity in _select(repository, commit, hub.tree(repo_id, commit), keep_original):
            _add(lock, identity)
    return lock, notes


def _add(lock: Lock, identity: Identity) -> None:
    other = lock.files.get(identity.target)
    if other is not None:
        raise DownloadError(
            f"{_origin(other.identity)} and {_origin(identity)} both go to {identity.target}",
            code="target_collision",
            hint="give one of them another folder or name in the recipe",
        )
    lock.files[identity.target] = LockedFile(identity)


def _select(repository: Repository, commit: str, files: Iterable[HubFile], keep_original: bool) -> Iterable[Identity]:
    files = list(files)
    for rule in repository.files:
        matched = [file for file in files if file.path == rule.pattern]
        if rule.is_glob and not matched:
            matched = [file for file in files if fnmatch.fnmatchcase(file.path, rule.pattern)]
        _check_matches(repository, commit, rule, matched, files)
        for file in matched:
            yield from _identities(repository.repo_id, commit, rule, file, keep_original)


def _check_matches(
    repository: Repository, commit: str, rule: FileRule, matched: list[HubFile], files: list[HubFile]
) -> None:
    where = f"{repository.repo_id} at {commit}"
    if not matched:
        import difflib

        near = difflib.get_close_matches(rule.pattern, [file.path for file in files], n=3)
        raise DownloadError(
            f"the pattern {rule.pattern!r} matches none of the {len(files)} files of {where}",
            code="pattern_empty",
            hint=f"did you mean {', '.join(near)}?" if near else "correct the recipe",
        )
    if (rule.name or rule.sha256) and len(matched) > 1:
        only = rule.name or f"the one of sha256 {rule.sha256}"
        raise DownloadError(
            f"the pattern {rule.pattern!r} matches {len(matched)} files of {where}, which cannot all be {only}",
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


def _identities(repo_id: str, commit: str, rule: FileRule, file: HubFile, keep_original: bool) -> Iterable[Identity]:
    """A file of the model directory, preceded by the original that it is converted from where that is kept."""
    check_relative_path(file.path, repo_id)
    target = rule.target(file.path)
    check_relative_path(target, f"the rule {rule.pattern!r} of {repo_id}")
    digest = f"sha256:{rule.sha256}" if rule.sha256 else file.digest
    wanted = Identity(target, repo_id, commit, file.path, file.size, digest, rule.convert, rule.wrapper)
    if keep_original and rule.convert:
        yield original_of(wanted)
    yield wanted


def original_of(identity: Identity) -> Identity:
    """Return the pickle checkpoint that a converted file comes from, as ``--keep-original`` keeps it."""
    target = f"{ORIGINALS}/{identity.repo_id}/{identity.path}"
    return dataclasses.replace(identity, target=target, convert=False, wrapper="")


def _check_targets(recipe: Recipe, lock: Lock) -> None:
    """Targets must differ also where a system ignores case, and none may be a folder of another."""
    own = {MODEL_INDEX, LOCK_NAME, *(f"{folder}/config.json" for folder in recipe.configs)}
    for folder in recipe.configs:
        check_relative_path(f"{folder}/config.json", f"recipe {recipe.name}")
    seen: dict[str, str] = {}
    for target in [*own, *lock.files]:
        for taken in (target.casefold(), *_folders(target.casefold())):
            if taken in seen and (taken == target.casefold() or seen[taken].casefold() == taken):
                raise DownloadError(
                    f"{target} collides with {seen[taken]}",
                    code="target_collision",
                    hint="give one of them another folder or name in the recipe",
                )
        seen[target.casefold()] = target
        for folder in _folders(target.casefold()):
            seen.setdefault(folder, f"{target} (a folder)")


def _folders(target: str) -> list[str]:
    parts = target.split("/")
    return ["/".join(parts[:count]) for count in range(1, len(parts))]


def _present(directory: Path, item: LockedFile, known: LockedFile | None) -> LockedFile:
    """Say whether a file is there: with the lock's size, or unknown to the lock but with the Hub's hash."""
    path = directory / item.identity.target
    require_place(path)
    if not path.is_file():
        return dataclasses.replace(item, size=None, sha256=None)
    if known is not None and known.sha256 is not None:
        whole = known.identity == item.identity and path.stat().st_size == known.size
        return known if whole else dataclasses.replace(item, size=None, sha256=None)
    return _adopt(path, item)


def _adopt(path: Path, item: LockedFile) -> LockedFile:
    """A file that somebody else put there is taken where its hash is right, and never overwritten otherwise."""
    kind, _, value = item.identity.digest.partition(":")
    if not item.identity.convert and path.stat().st_size == item.identity.size:
        digests = digests_of(path, git=kind == "git")
        if digests[kind] == value:
            return LockedFile(item.identity, item.identity.size, digests["sha256"])
    raise DownloadError(
        f"{path} was not put there by port-kit and is not {_origin(item.identity)}",
        code="target_foreign",
        hint="move it away, or choose another --output-dir",
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
