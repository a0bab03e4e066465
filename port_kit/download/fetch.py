"""Concurrent download of files, from the URL to the final name, in segments.

One thread per file runs :meth:`Fetcher._download_once`: it acquires a partial download, plans the conversion if there
is one, queues the segments that are missing, hashes received bytes, converts and publishes. A pool of connections takes
segments from the queue, in the order of the plan (:func:`_fetch_segment`). Files that this machine already has (in the
Hub cache, or as a kept original) are copied and hashed in the same way. The condition for publishing is stated in
:mod:`port_kit.download.incoming_file`.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from queue import Empty, Queue
from typing import TYPE_CHECKING

from port_kit.download.http import Interrupted, Response, network_error
from port_kit.download.hub import HubClient, RangeSource, length_of_range
from port_kit.download.incoming_file import BUFFER_SIZE, Damaged, IncomingFile, Misplaced, copy_segment
from port_kit.download.lock import append_journal
from port_kit.download.parts import ALIGNMENT, FileSpec, Segment, acquire
from port_kit.download.plan import original_of
from port_kit.download.progress import Progress
from port_kit.download.urls import TransportError
from port_kit.errors import CheckpointError, DownloadError
from port_kit.escape import quoted, reason_of
from port_kit.files import os_errors_as, require_space

if TYPE_CHECKING:
    from port_kit.checkpoint.safetensors_writer import SafetensorsLayout

_SAMPLED_OFFSETS = 5
# Bytes between two failed attempts that reset the count: a server that sends single bytes runs out of attempts.
_PROGRESS = 1 << 16
# Bytes of an answer that is shorter than the range that was asked for, and still worth asking again without a pause.
_SHORTEST_ANSWER = 1 << 12


class Fetcher:
    """Fetches files into a model directory.

    Args:
        directory: the model directory; its lock is held by the caller.
        hub: source of the files.
        progress: receives every byte count.
        exclusive: whether that lock keeps other hosts out.
        use_cache: whether the user's Hub cache is looked into.

    Attributes:
        finished: ``{target: (size, sha256)}`` of the files that are in place.
        network_bytes, local_bytes: source bytes by origin.
    """

    def __init__(
        self, directory: Path, hub: HubClient, progress: Progress, *, exclusive: bool, use_cache: bool
    ) -> None:
        self.directory, self.hub, self.progress = directory, hub, progress
        self.finished: dict[str, tuple[int, str]] = {}
        self.network_bytes = self.local_bytes = 0
        self._policy, self._exclusive, self._use_cache = hub.http.policy, exclusive, use_cache
        self._files: Queue[FileSpec] = Queue()
        self._segments: Queue[tuple[IncomingFile, Segment]] = Queue()
        self._lock = threading.Lock()
        self._failure: BaseException | None = None
        self._ended = threading.Event()

    def run(self, specs: Sequence[FileSpec]) -> None:
        """Download all files; on return they are in place.

        Raises:
            DownloadError, CheckpointError: the first failure; received bytes are kept for the next run.
            KeyboardInterrupt: passed on at once, with the connections closed.
        """
        for spec in specs:
            self._files.put(spec)
        self._ended.clear()
        owners = self._start(self._download_files, min(self._policy.files_at_once, len(specs)))
        self._start(self._fetch_segments, self._policy.connections)
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

    def _start(self, work: Callable[[], None], count: int) -> list[threading.Thread]:
        threads = [threading.Thread(target=work, daemon=True) for _ in range(count)]
        for thread in threads:
            thread.start()
        return threads

    def _download_files(self) -> None:
        """Run the thread of a file: one file after another, until none is left or something has failed."""
        while self._failure is None:
            try:
                self._download(self._files.get_nowait())
            except (Empty, Interrupted):
                return
            except BaseException as error:  # noqa: B036 - carried to the caller's thread, which raises it
                with self._lock:  # the first failure counts, and stops all other threads
                    self._failure = self._failure or error
                self.hub.http.stop()

    def _fetch_segments(self) -> None:
        """Run the thread of a connection: one segment after another. The file's thread reports failures."""
        while not self._ended.is_set():
            try:
                incoming, segment = self._segments.get(timeout=0.1)
            except Empty:
                continue
            with incoming.in_use() as wanted:
                try:
                    if wanted and incoming.local is not None:
                        copy_segment(incoming, incoming.local, segment)
                    elif wanted:
                        _fetch_segment(self.hub, incoming, segment)
                except BaseException as error:  # noqa: B036 - carried to the file's thread, which raises it
                    incoming.failure = incoming.failure or error

    def _count(self, count: int, local: bool) -> None:
        with self._lock:
            self.local_bytes += count if local else 0
            self.network_bytes += 0 if local else count
        self.progress.advance(count)

    def _download(self, spec: FileSpec) -> None:
        """Download one file. Content that turns out wrong is fetched once more, from the beginning."""
        try:
            self._download_once(spec, find_local(self.directory, spec, self._use_cache))
        except Damaged as first:
            self.progress.note(f"{spec.target}: {first}; fetching it again")
            try:
                self._download_once(spec, None, exact_offsets=isinstance(first, Misplaced))
            except Damaged as second:
                raise DownloadError(
                    f"{spec.repo_id}/{spec.path} arrived twice with wrong content: {second}",
                    code="hash_mismatch",
                    hint="a proxy or mirror may alter it: try another endpoint, or tell the repository's owner",
                ) from second

    def _download_once(self, spec: FileSpec, local: Path | None, *, exact_offsets: bool = False) -> None:
        """Take one file from its URL, or from ``local``, to its final name."""
        partial = acquire(self.directory, spec, self._policy.segment_for(spec.size), exclusive=self._exclusive)
        try:
            conversion = self._plan_conversion(spec, local, exact_offsets) if spec.convert else None
            incoming = IncomingFile(partial, conversion, local, lambda count: self._count(count, local is not None))
            require_space(self.directory, partial.layout.extent - partial.written)
            try:
                for segment in partial.segments:
                    if not segment.is_complete:
                        self._segments.put((incoming, segment))
                source_sha256 = incoming.hash_source(lambda: self.hub.http.stopped)
            finally:
                incoming.close_when_idle()
            if conversion is not None:
                self.progress.note(f"  {spec.target}  arrived; checking and completing the conversion")
            with os_errors_as(partial.folder):
                size, sha256 = incoming.finalize(source_sha256)
            with os_errors_as(self.directory / spec.target):
                append_journal(self.directory, spec, size, sha256)
                partial.publish(self.directory, size)
            with self._lock:
                self.finished[spec.target] = (size, sha256)
            self.progress.file_done(spec.target, size)
        except Damaged:
            self.progress.advance(-partial.written)
            partial.discard()
            raise
        finally:
            partial.close()

    def _plan_conversion(self, spec: FileSpec, local: Path | None, exact_offsets: bool) -> SafetensorsLayout:
        """Read the directory and the pickle of a remote checkpoint, and lay out the converted file.

        Storages are placed by torch's alignment rule, which saves a request per storage. The rule is checked on a few
        of them now, and on all of them when the file has arrived.
        """
        from port_kit.checkpoint.byte_sources import CachedSource, FileSource
        from port_kit.checkpoint.pickle_reader import check_offsets, read_tables
        from port_kit.checkpoint.safetensors_writer import plan_layout, scalars

        if local is not None:
            try:
                with FileSource(local) as source:
                    return plan_layout(
                        read_tables(source, spec.wrapper, drop=spec.drop), source.name, leave_out_scalars=True
                    )
            except (CheckpointError, OSError) as error:  # the repository's bytes decide
                raise Damaged(f"{local} cannot be converted: {reason_of(error)}") from error
        remote = CachedSource(RangeSource(self.hub, spec))
        tables = read_tables(remote, spec.wrapper, drop=spec.drop, exact_offsets=exact_offsets)
        by_size = sorted(tables.storages, key=lambda key: tables.storages[key].nbytes)
        sample = {key: tables.storages[key] for key in [*by_size[:1], *by_size[-_SAMPLED_OFFSETS:]]}
        if not exact_offsets and check_offsets(remote, sample):
            return self._plan_conversion(spec, local, exact_offsets=True)
        for key, kind in scalars(tables).items():
            self.progress.note(f"  {spec.target}  leaves out {key} ({kind}), which is no tensor")
        layout = plan_layout(tables, remote.name, leave_out_scalars=True)
        try:
            layout.byte_layout()
        except ValueError as error:
            raise DownloadError(
                f"{remote.name}: {reason_of(error)}",
                code="convert_layout",
                hint="download it as it is and convert it on disk: --keep-original",
            ) from error
        return layout


def find_local(directory: Path, spec: FileSpec, use_cache: bool) -> Path | None:
    """Return a kept original, or a file of the user's Hub cache; its content is hashed like anything that arrives."""
    from huggingface_hub import constants

    candidates = [directory / original_of(spec).target] if spec.convert else []
    if use_cache and os.path.isdir(os.path.join(constants.HF_HUB_CACHE, f"models--{spec.repo_id.replace('/', '--')}")):
        from huggingface_hub import try_to_load_from_cache  # half a second of imports: only if there is a cache

        with contextlib.suppress(OSError):  # a cache that may not be read is not used
            cached = try_to_load_from_cache(spec.repo_id, spec.path, revision=spec.commit)
            candidates += [Path(cached)] if isinstance(cached, str) else []
    return next((path for path in candidates if _is_readable(path, spec.size)), None)


def _is_readable(path: Path, size: int) -> bool:
    """Return True if a file of this size can be read; False without the permission to check."""
    try:
        return path.is_file() and path.stat().st_size == size and os.access(path, os.R_OK)
    except OSError:
        return False


def _fetch_segment(hub: HubClient, incoming: IncomingFile, segment: Segment) -> None:
    """Receive the missing bytes of a segment; retries while attempts make progress.

    Raises:
        DownloadError: the network or the Hub's refusal.
        Damaged: the answers are not the file.
    """
    what = f"{incoming.spec.repo_id}/{incoming.spec.path}"
    policy, attempts = hub.http.policy, 0
    enough = min(_PROGRESS, (segment.end - segment.start) // 8 or 1)
    before = segment.position
    while not segment.is_complete:
        begin = segment.position
        try:
            _receive(hub, incoming, segment)
            if segment.position < min(segment.end, begin + _SHORTEST_ANSWER):
                raise TransportError(f"the answer to the range from {begin} had {segment.position - begin} bytes of it")
        except TransportError as error:
            attempts += 1
            if segment.position >= before + enough:
                before, attempts = segment.position, 1
            incoming.location = None
            if segment.is_complete:
                return
            if attempts >= policy.attempts:
                raise network_error(f"fetching {what}", error, attempts) from error
            hub.http.sleep(policy.pause(attempts))
            with incoming.in_use() as wanted:
                if not wanted:
                    raise Interrupted from error


def _receive(hub: HubClient, incoming: IncomingFile, segment: Segment) -> None:
    """Make one request and write the bytes of the answer."""
    size, position = incoming.spec.size, segment.position
    headers = {}
    if (position, segment.end) != (0, size):
        headers["Range"] = f"bytes={position}-{segment.end - 1}"
    with _open(hub, incoming, headers) as response, incoming.in_use(response) as wanted:
        if not wanted:
            raise Interrupted
        encoding = response.headers.get("Content-Encoding") or "identity"
        if encoding != "identity":
            raise Damaged(f"the server sends it in {quoted(encoding)} encoding, which was not asked for")
        if response.status == 206:
            count = length_of_range(response, position, segment.end, size)
            _copy(response, incoming, position, position + count)
        elif response.status == 200:
            if response.length not in (None, size):
                raise Damaged(f"the server sends {response.length} bytes, the repository states {size}")
            with incoming.whole:
                if not segment.is_complete:
                    _copy(response, incoming, 0, size)
        else:
            raise Damaged(f"the server answers HTTP {response.status} to the range from {position}")


def _open(hub: HubClient, incoming: IncomingFile, headers: dict[str, str]) -> Response:
    """Ask the place to which the last answer was redirected; if it refuses (signatures expire), ask the Hub again."""
    location = incoming.location
    try:
        response = hub.open(incoming.spec, headers, location)
    except DownloadError as error:
        if location is None:
            raise
        raise TransportError(error.message) from error
    incoming.location = response.url
    return response


def _copy(response: Response, incoming: IncomingFile, offset: int, end: int) -> None:
    """Write the bytes ``[offset, end)`` of the source, the start of the response's body; ignore the rest.

    A buffer holds bytes of one segment. Connections that receive the complete file write to all segments.

    Raises:
        TransportError: the body ends earlier.
    """
    segments = incoming.partial.segments
    width = segments[0].end - segments[0].start
    while offset < end:
        segment = segments[offset // width]
        buffer = incoming.take_buffer()
        begin = offset % ALIGNMENT  # align the ends of pieces to the disk
        room = min(segment.end - offset, BUFFER_SIZE - begin)
        try:
            count = response.read_into(buffer.memory[begin : begin + room])
        except BaseException:
            incoming.write(segment, offset, buffer, 0, 0)
            raise
        incoming.write(segment, offset, buffer, begin, count)
        if not count:
            raise TransportError(f"the answer ends {end - offset} bytes early")
        offset += count
