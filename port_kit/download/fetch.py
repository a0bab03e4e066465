"""Bring the planned files: several at a time, several segments of each, hashed while they arrive.

One thread a file prepares it, hashes what has landed, seals and publishes it. A pool of connections fetches segments,
in the order of the plan. A file that lies on this machine already (in the Hub cache, as a kept original) takes the same
way, with the disk in place of a connection.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, Queue
from typing import TYPE_CHECKING

from port_kit.download.files import explained, require_space
from port_kit.download.http import Interrupted
from port_kit.download.hub import HubClient
from port_kit.download.landing import Damaged, Landing, Misplaced, copy_segments
from port_kit.download.lock import append_journal
from port_kit.download.parts import Identity, Part, Segment, take_part
from port_kit.download.progress import Progress
from port_kit.download.remote import RangeSource, fetch_segment
from port_kit.errors import DownloadError

if TYPE_CHECKING:
    from port_kit.checkpoint.byte_sources import ByteSource
    from port_kit.checkpoint.pickle_reader import Storage
    from port_kit.download.blueprint import Blueprint

_SAMPLED_OFFSETS = 5


@dataclass
class Fetched:
    """What a fetch did: finished files ``{target: (size, sha256)}``, and source bytes by where they came from."""

    files: dict[str, tuple[int, str]] = field(default_factory=dict)
    network_bytes: int = 0
    local_bytes: int = 0


class Fetcher:
    """Fetches files into a model directory.

    Args:
        directory: the model directory; its lock is held by the caller.
        hub: where files come from.
        progress: told of every byte.
        find_local: returns a file that may hold the source's bytes already (they are hashed), or None.
    """

    def __init__(
        self,
        directory: Path,
        hub: HubClient,
        progress: Progress,
        *,
        find_local: Callable[[Identity], Path | None] = lambda identity: None,
    ) -> None:
        self.directory, self.hub, self.progress = directory, hub, progress
        self.result = Fetched()
        self._policy, self._find_local = hub.http.policy, find_local
        self._files: Queue[Identity] = Queue()
        self._segments: Queue[tuple[Landing, Segment]] = Queue()
        self._lock = threading.Lock()
        self._failure: BaseException | None = None
        self._ended = threading.Event()

    def run(self, identities: Sequence[Identity]) -> Fetched:
        """Fetch all files; on return they are in place.

        Raises:
            DownloadError, CheckpointError: the first failure; what has landed is kept for the next run.
            KeyboardInterrupt: passed on at once, with the connections closed.
        """
        for identity in identities:
            self._files.put(identity)
        self._ended.clear()
        owners = self._start(self._own_files, min(self._policy.files_at_once, len(identities)))
        self._start(self._bring_segments, self._policy.connections)
        try:
            for thread in owners:
                while thread.is_alive():
                    thread.join(0.1)
        except BaseException:
            self.hub.http.stop()
            raise
        finally:
            self._ended.set()
        if self._failure is not None:
            raise self._failure
        return self.result

    def _start(self, work: Callable[[], None], count: int) -> list[threading.Thread]:
        threads = [threading.Thread(target=work, daemon=True) for _ in range(count)]
        for thread in threads:
            thread.start()
        return threads

    def _own_files(self) -> None:
        """A file's thread: one file after another, until none is left or something has failed."""
        while self._failure is None:
            try:
                self._bring(self._files.get_nowait())
            except (Empty, Interrupted):
                return
            except BaseException as error:  # noqa: B036 - carried to the caller's thread, which raises it
                self._fail(error)

    def _fail(self, error: BaseException) -> None:
        """Keep the first failure and stop everybody else."""
        with self._lock:
            self._failure = self._failure or error
        self.hub.http.stop()

    def _bring_segments(self) -> None:
        """A connection's thread: one segment after another; a failure is the file's, whose thread reports it."""
        while not self._ended.is_set():
            try:
                landing, segment = self._segments.get(timeout=0.1)
            except Empty:
                continue
            with landing.used() as wanted:
                try:
                    if wanted:
                        self._bring_segment(landing, segment)
                except BaseException as error:  # noqa: B036 - carried to the file's thread, which raises it
                    landing.failure = landing.failure or error

    def _bring_segment(self, landing: Landing, segment: Segment) -> None:
        if landing.local is not None:
            copy_segments(landing, landing.local, segment.position, segment.end, self._count_local)
        else:
            fetch_segment(self.hub, landing, segment, self._count_network)

    def _count_network(self, count: int) -> None:
        with self._lock:
            self.result.network_bytes += count
        self.progress.advance(count)

    def _count_local(self, count: int) -> None:
        with self._lock:
            self.result.local_bytes += count
        self.progress.advance(count)

    def _bring(self, identity: Identity) -> None:
        """Fetch one file; content that turns out wrong is fetched once more, from the beginning."""
        try:
            self._bring_once(identity, self._find_local(identity))
        except Damaged as first:
            self.progress.note(f"{identity.target}: {first}; fetching it again")
            try:
                self._bring_once(identity, None)
            except Misplaced as second:
                raise _unusual_layout(f"{identity.repo_id}/{identity.path}", "a storage") from second
            except Damaged as second:
                raise DownloadError(
                    f"{identity.repo_id}/{identity.path} arrived twice with wrong content: {second}",
                    code="hash_mismatch",
                    hint="a proxy or mirror may alter it: try another endpoint, or tell the repository's owner",
                ) from second

    def _bring_once(self, identity: Identity, local: Path | None) -> None:
        part = take_part(self.directory, identity, self._policy.segment_for(identity.size))
        try:
            if part.sealed is None:
                self._fill(part, local)
            self._publish(part)
        except Damaged:
            self.progress.advance(-part.written)
            part.discard()
            raise
        finally:
            part.close()

    def _fill(self, part: Part, local: Path | None) -> None:
        blueprint = self._draw(part.identity, local) if part.identity.convert else None
        landing = Landing(part, blueprint, local)
        require_space(self.directory, part.layout.extent - part.written)
        try:
            for segment in part.segments:
                if not segment.is_complete:
                    self._segments.put((landing, segment))
            sha256 = landing.check_source(lambda: self.hub.http.stopped)
        finally:
            landing.retire()
        if blueprint is not None:
            self.progress.note(f"  {part.identity.target}  arrived; checking and sealing the conversion")
        with explained(part.folder):
            landing.seal(sha256)

    def _draw(self, identity: Identity, local: Path | None) -> Blueprint:
        """Read a checkpoint's directory and pickle where they lie, and lay out what it becomes."""
        from port_kit.checkpoint.byte_sources import CachedSource, FileSource
        from port_kit.checkpoint.pickle_reader import read_tables
        from port_kit.download.blueprint import draw

        if local is not None:
            with FileSource(local) as source:
                return draw(read_tables(source, identity.wrapper), source.name)
        remote = CachedSource(RangeSource(self.hub, identity))
        tables = read_tables(remote, identity.wrapper, exact_offsets=False)
        _sample_offsets(remote, sorted(tables.storages, key=lambda key: tables.storages[key].nbytes), tables.storages)
        blueprint = draw(tables, remote.name)
        try:
            blueprint.layout()
        except ValueError as error:
            raise _unusual_layout(remote.name, "a storage") from error
        return blueprint

    def _publish(self, part: Part) -> None:
        sealed = part.sealed
        assert sealed is not None, "a part is sealed before it is published"
        size, sha256, target = sealed["size"], sealed["sha256"], part.identity.target
        part.truncate(size)
        with explained(self.directory / target):
            append_journal(self.directory, target, size, sha256)
            part.publish(self.directory)
        with self._lock:
            self.result.files[target] = (size, sha256)
        self.progress.file_done(target, size)


def _sample_offsets(source: ByteSource, keys: list[str], storages: Mapping[str, Storage]) -> None:
    """Check torch's alignment rule on a few storages before gigabytes are placed by it."""
    from port_kit.checkpoint.pickle_reader import check_offsets

    sampled = {key: storages[key] for key in [*keys[:1], *keys[-_SAMPLED_OFFSETS:]]}
    wrong = check_offsets(source, sampled)
    if wrong:
        raise _unusual_layout(source.name, f"storage {wrong[0]}")


def _unusual_layout(name: str, what: str) -> DownloadError:
    return DownloadError(
        f"{name}: {what} does not lie where torch would have put it",
        code="convert_layout",
        hint="download it as it is and convert it on disk: --keep-original",
    )
