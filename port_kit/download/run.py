"""One run: plan, fetch, convert, git code, assemble; or find that everything is there."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any, NamedTuple

from port_kit.download.assemble import assemble, invalidate_index
from port_kit.download.fetch import Fetcher
from port_kit.download.http import HttpClient, Policy
from port_kit.download.hub import HubClient
from port_kit.download.install import examine_code, install_all, is_installed, plan_code
from port_kit.download.lock import LOCK_NAME, MODEL_INDEX, Lock, damaged_files, has_size, is_whole, read_lock
from port_kit.download.parts import remove_stale
from port_kit.download.paths import check_locale
from port_kit.download.plan import Plan, has_originals, make_plan, original_of
from port_kit.download.progress import Progress
from port_kit.download.recipe import Recipe
from port_kit.download.state import STATE_FOLDER, directory_lock, may_lock, remove_empty_folders, remove_file
from port_kit.errors import DownloadError
from port_kit.files import os_errors_as

_DEEPEST = 200


@dataclass(frozen=True)
class Settings:
    """The options of :func:`download`.

    Attributes:
        dry_run: only plan, write no file.
        offline: use no network; an error if something is missing. Default, and None: as ``HF_HUB_OFFLINE`` says.
        verify: hash every file; damaged files are fetched again (with ``offline``: an error).
        update: resolve unconfirmed revisions anew.
        prune: delete files in the directory that are not part of the model; it must have a ``port.lock`` already.
        with_reference: also install the original code.
        keep_original: keep pickle checkpoints under ``original/`` beside the converted files.
        use_cache: take files from the user's Hub cache if their hash is right.
        endpoint: a mirror instead of ``HF_ENDPOINT``.
        token: None for the one that huggingface_hub finds, False for none.
        policy: timeouts, retries, connections.
    """

    dry_run: bool = False
    offline: bool | None = None
    verify: bool = False
    update: bool = False
    prune: bool = False
    with_reference: bool = False
    keep_original: bool = False
    use_cache: bool = True
    endpoint: str | None = None
    token: str | bool | None = None
    policy: Policy = Policy()


class Report(NamedTuple):
    """The result of a run.

    Attributes:
        directory: the model directory.
        plan: the executed plan; None if the directory was up to date, in which case no request was made.
        fetched: targets that were downloaded or repaired.
        repaired: ``{target: problem}`` of files that were complete before.
        network_bytes, local_bytes: source bytes by origin.
        removed: files of an earlier recipe or revision, and with ``prune`` untracked files, that were deleted.
        untracked_files: files in the directory that the kit did not record.
        code: ``{name: folder}`` of the git code that was installed.
        seconds: wall time.
        complete: True if the directory is complete now.
    """

    directory: Path
    plan: Plan | None = None
    fetched: tuple[str, ...] = ()
    repaired: Mapping[str, str] = MappingProxyType({})
    network_bytes: int = 0
    local_bytes: int = 0
    removed: tuple[str, ...] = ()
    untracked_files: tuple[str, ...] = ()
    code: Mapping[str, str] = MappingProxyType({})
    seconds: float = 0.0
    complete: bool = True

    def to_json(self) -> dict[str, Any]:
        """Return the plain form."""
        plan = self.plan.to_json() if self.plan else None
        mappings = {"repaired": dict(self.repaired), "code": dict(self.code)}
        plain = {"directory": str(self.directory), "plan": plan, "seconds": round(self.seconds, 3)}
        return {**self._asdict(), **plain, **mappings}


def download(recipe: Recipe, output_dir: str | Path, *, progress: Progress | None = None, **options: Any) -> Report:
    """Make ``output_dir`` the model directory that the recipe describes. Run it again after any interruption.

    Args:
        recipe: the recipe.
        output_dir: the model directory; created if it is missing.
        progress: receives all events; default: no output.
        options: the fields of :class:`Settings`.

    Raises:
        DownloadError, CheckpointError: with a code and a hint; the directory has no ``model_index.json`` then, unless
            it was complete and did not change.
    """
    return Run(recipe, Path(output_dir), Settings(**options), progress or Progress()).execute()


class Run:
    """The state of one call of :func:`download`."""

    def __init__(self, recipe: Recipe, directory: Path, settings: Settings, progress: Progress) -> None:
        self.recipe, self.settings, self.progress = recipe, settings, progress
        self.directory = directory.absolute()
        self.offline = settings.offline
        if self.offline is None:  # these are huggingface_hub's words
            self.offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
        self._hub: HubClient | None = None
        self._exclusive = True
        self._begun = time.monotonic()

    def execute(self) -> Report:
        """Do everything; see :func:`download`."""
        _check_directory(self.directory)
        try:
            with os_errors_as(self.directory):  # errors without a more specific explanation
                return self._execute()
        finally:
            if self._hub is not None:
                self._hub.http.close()

    def _execute(self) -> Report:
        if self.settings.update and self.offline:
            raise DownloadError(
                "what a branch points to now cannot be found out without the network",
                code="offline_incomplete",
                hint="leave out --update or --offline",
            )
        if self.settings.dry_run:
            return self._dry_run()
        if self.offline and not self.directory.is_dir():
            raise self._incomplete(["everything"])
        self.directory.mkdir(parents=True, exist_ok=True)
        if not may_lock(self.directory):
            return self._read_only()
        with directory_lock(self.directory, self.progress.note) as self._exclusive:
            return self._locked()

    def _dry_run(self) -> Report:
        known, damaged, whole = self._inspect(repair=False)
        if self.offline and whole:
            return self._report()
        for target in damaged:
            if known is not None and target in known.files:
                known.files[target] = dataclasses.replace(known.files[target], size=-1)
        _, plan = self._plan(known)
        notes = tuple(f"{target}: {problem}" for target, problem in damaged.items())
        return self._report(plan=dataclasses.replace(plan, notes=plan.notes + notes), complete=False)

    def _read_only(self) -> Report:
        """Verify a directory on a read-only disk: return its report if it is complete, otherwise raise."""
        known, damaged, whole = self._inspect(repair=False)
        if whole:
            return self._report(untracked_files=self._untracked_files(known))
        found = f" ({', '.join(f'{target}: {problem}' for target, problem in list(damaged.items())[:5])})"
        raise DownloadError(
            f"{self.directory} is not what the recipe describes and may not be written{found if damaged else ''}",
            code="output_dir",
            hint="choose another --output-dir",
        )

    def _locked(self) -> Report:
        known, damaged, whole = self._inspect(repair=not self.offline)
        untracked = self._untracked_files(known) if self.settings.prune and known is None else ()
        if untracked:
            raise DownloadError(
                f"{self.directory} was no model directory before, and holds other files: {', '.join(untracked[:5])}",
                code="target_foreign",
                hint="run it without --prune first, look at the files that it calls untracked, then prune",
            )
        if whole:
            return self._finish(self._untracked_files(known))
        return self._finish_offline(known, damaged) if self.offline else self._download(known, damaged)

    def _inspect(self, *, repair: bool) -> tuple[Lock | None, dict[str, str], bool]:
        """Return the directory's lock, its damaged files (with ``verify``), and True if it is up to date."""
        known = read_lock(self.directory)
        if known is not None and known.recipe != self.recipe.name:
            raise DownloadError(
                f"{self.directory} holds {known.recipe}, not {self.recipe.name}",
                code="target_foreign",
                hint=f"choose another --output-dir, or take it away first: port-kit remove {self.directory}",
            )
        damaged = self._examine(known, repair=repair) if self.settings.verify and known else {}
        return known, damaged, not damaged and self._is_up_to_date(known)

    def _is_up_to_date(self, known: Lock | None) -> bool:
        if known is None or self.settings.update or (self.settings.keep_original and not has_originals(known)):
            return False
        return is_whole(self.directory, known, self.recipe.fingerprint()) and not self._code_is_missing(known)

    def _examine(self, known: Lock, *, repair: bool) -> dict[str, str]:
        """Hash the files of the lock; ``repair`` deletes damaged ones, so that they are fetched again."""
        self.progress.begin("hashing", sum(size for _, size, _ in known.contents()))
        damaged = damaged_files(self.directory, known, self.progress.advance)
        self.progress.end()
        examine_code(self.recipe.code, known.code)
        for target, problem in damaged.items():
            self.progress.note(f"{target}: {problem}")
            if repair:
                self._remove_damaged(known, target)
        return damaged

    def _remove_damaged(self, known: Lock, target: str) -> None:
        invalidate_index(self.directory)
        path = self.directory / target
        if path.exists() and (target not in known.created() or not remove_file(self.directory, target)):
            raise DownloadError(
                f"{path} is damaged, and was not put there by port-kit, or lies behind a linked folder",
                code="target_foreign",
                hint="move it away, and run the same command again",
            )

    def _finish_offline(self, known: Lock | None, damaged: dict[str, str]) -> Report:
        """Without the network only the last step can be missing."""
        if known is None or known.fingerprint != self.recipe.fingerprint():
            raise self._incomplete(["a port.lock for this recipe"])
        absent = [
            target
            for target, item in known.files.items()
            if target in damaged or not has_size(self.directory / target, item.size)
        ]
        absent += ["the git code"] if self._code_is_missing(known) else []
        if absent:
            raise self._incomplete(absent)
        assemble(self.directory, self.recipe, known)
        return self._finish()

    def _incomplete(self, absent: list[str]) -> DownloadError:
        return DownloadError(
            f"{self.directory} lacks {', '.join(absent[:8])}, and the network may not be used",
            code="offline_incomplete",
            hint="run it once with the network",
            missing=absent,
        )

    def _plan(self, known: Lock | None) -> tuple[HubClient, Plan]:
        if self.offline:
            raise self._incomplete(["a plan, which is made with the network"])
        settings = self.settings
        self._hub = hub = HubClient(HttpClient(settings.policy), endpoint=settings.endpoint, token=settings.token)
        plan = make_plan(
            self.recipe,
            self.directory,
            hub,
            known,
            update=settings.update,
            keep_original=settings.keep_original,
            exclusive=self._exclusive,
        )
        if settings.with_reference:
            plan.lock.code = plan_code(self.recipe.code, {} if settings.update else plan.lock.code)
        return hub, plan

    def _download(self, known: Lock | None, repaired: dict[str, str]) -> Report:
        hub, plan = self._plan(known)
        for note in plan.notes:
            self.progress.note(note)
        invalidate_index(self.directory)
        removed = self._clear(plan, known)
        lock = plan.lock
        lock.complete = False
        lock.save(self.directory)
        fetcher = self._fetch(hub, plan)
        for target, (size, sha256) in fetcher.finished.items():
            lock.files[target] = dataclasses.replace(lock.files[target], size=size, sha256=sha256)
        remove_stale(self.directory, set(), exclusive=self._exclusive)
        code = install_all(self.recipe.code, lock.code) if self.settings.with_reference else {}
        assemble(self.directory, self.recipe, lock)
        return self._finish(
            self._untracked_files(lock),
            removed,
            plan=plan,
            fetched=tuple(sorted(fetcher.finished)),
            repaired=repaired,
            network_bytes=fetcher.network_bytes,
            local_bytes=fetcher.local_bytes,
            code=code,
        )

    def _clear(self, plan: Plan, known: Lock | None) -> tuple[str, ...]:
        """Delete files that the kit created and that are to be replaced, or are not part of the model any more."""
        created = known.created() if known else set()
        fetched = {spec.target for spec in plan.fetch}
        stale = created - plan.lock.files.keys() - plan.lock.written.keys()
        removed = [target for target in sorted(created & (fetched | stale)) if remove_file(self.directory, target)]
        remove_empty_folders(self.directory, stale)
        remove_stale(self.directory, fetched, exclusive=self._exclusive)
        return tuple(target for target in removed if target in stale)

    def _fetch(self, hub: HubClient, plan: Plan) -> Fetcher:
        """Fetch the missing files; files converted from kept originals come after the originals."""
        self.progress.begin("fetching", sum(spec.size for spec in plan.fetch), plan.resumed)
        fetcher = Fetcher(
            self.directory, hub, self.progress, exclusive=self._exclusive, use_cache=self.settings.use_cache
        )
        late = [item for item in plan.fetch if item.convert and original_of(item).target in plan.lock.files]
        try:
            fetcher.run([spec for spec in plan.fetch if spec not in late])
            if late:
                fetcher.run(late)
        finally:
            self.progress.end()
        return fetcher

    def _code_is_missing(self, known: Lock) -> bool:
        wanted = self.recipe.code if self.settings.with_reference else ()
        return not all(
            code.name in known.code and is_installed(code, known.code[code.name]["commit"]) for code in wanted
        )

    def _untracked_files(self, lock: Lock | None) -> tuple[str, ...]:
        known = {*(lock.files if lock else ()), *(lock.written if lock else ()), LOCK_NAME, MODEL_INDEX}
        known |= {str(parent) for target in known for parent in PurePosixPath(target).parents}  # a folder may be a link
        others = [target for target in files_below(self.directory) if target not in known]
        ours = {os.path.realpath(self.directory / target) for target in known} if others else set()
        return tuple(target for target in others if os.path.realpath(self.directory / target) not in ours)

    def _finish(self, untracked: tuple[str, ...] = (), removed: tuple[str, ...] = (), **facts: Any) -> Report:
        pruned = tuple(target for target in untracked if self.settings.prune and remove_file(self.directory, target))
        kept = tuple(target for target in untracked if target not in pruned)
        return self._report(untracked_files=kept, removed=(*removed, *pruned), **facts)

    def _report(self, **facts: Any) -> Report:
        return Report(self.directory, seconds=time.monotonic() - self._begun, **facts)


def files_below(directory: Path) -> Iterable[str]:
    """Yield the files of a directory with ``/``, without the kit's own state."""
    for path in sorted(directory.rglob("*")):
        relative = path.relative_to(directory).as_posix()
        if relative.partition("/")[0] != STATE_FOLDER and (path.is_file() or path.is_symlink()):
            yield relative


def _check_directory(directory: Path) -> None:
    name = str(directory)
    check_locale(name, f"{ascii(name)} cannot be written in the locale of this process", "output_dir")
    with os_errors_as(directory):
        problem = ""
        if directory.exists() and not directory.is_dir():
            problem = "is a file; a folder is required"
        elif directory.is_symlink() and not directory.exists():
            problem = f"is a link to {os.readlink(directory)}, which does not exist"
        elif len(directory.parts) > _DEEPEST:
            problem = f"lies below {_DEEPEST} other folders"
        if problem:
            raise DownloadError(f"{directory} {problem}", code="output_dir", hint="choose another --output-dir")
