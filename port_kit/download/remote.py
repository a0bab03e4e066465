"""Segments of a file from the Hub, and a file of the Hub read by offset."""

from __future__ import annotations

import re
from functools import partial

from port_kit.download.http import Interrupted, Response, network_error
from port_kit.download.hub import HubClient
from port_kit.download.incoming_file import BUFFER_SIZE, Damaged, IncomingFile
from port_kit.download.parts import ALIGNMENT, FileSpec, Segment
from port_kit.download.urls import TransportError
from port_kit.errors import DownloadError

# Bytes between two failed attempts that make the first one forgotten: a server that drips is given up.
_PROGRESS = 1 << 16
# Bytes of an answer that is shorter than the range that was asked for, and still worth asking again without a pause.
_SHORTEST_ANSWER = 1 << 12
_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)")


class _RangesIgnored(TransportError):
    """The server sends the whole file when it is asked for a range."""


def fetch_segment(hub: HubClient, incoming: IncomingFile, segment: Segment) -> None:
    """Receive what a segment lacks, in as many attempts as make progress.

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
            raise Damaged(f"the server sends it in {encoding[:40]} encoding, which was not asked for")
        if response.status == 206:
            count = _length_of_range(response, position, segment.end, size)
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
    spec, location = incoming.spec, incoming.location
    try:
        response = hub.open(spec.repo_id, spec.commit, spec.path, headers, location)
    except DownloadError as error:
        if location is None:
            raise
        raise TransportError(error.message) from error
    incoming.location = response.url
    return response


def _length_of_range(response: Response, start: int, end: int, size: int) -> int:
    """Return how many bytes a 206 holds: it begins where it was asked to and ends no later; it may end earlier."""
    said = response.headers.get("Content-Range")
    found = _CONTENT_RANGE.fullmatch(said or "")
    last = int(found[2]) if found else -1
    if found is None or int(found[1]) != start or not start <= last < end or found[3] not in (str(size), "*"):
        raise TransportError(f"asked for bytes from {start} to {end - 1} of {size}, the server sends {said!r}")
    if response.length not in (None, last + 1 - start):
        raise TransportError(f"the server states the range {said!r} and {response.length} bytes")
    return last + 1 - start


def _copy(response: Response, incoming: IncomingFile, offset: int, end: int) -> None:
    """Write the bytes ``[offset, end)`` of the source, which the response's body begins with; ignore what follows.

    A buffer holds bytes of one segment. Connections that receive the whole file write to all segments.

    Raises:
        TransportError: the body ends earlier.
    """
    segments = incoming.partial.segments
    width = segments[0].end - segments[0].start
    while offset < end:
        segment = segments[offset // width]
        buffer = incoming.take_buffer()
        begin = offset % ALIGNMENT  # so that pieces end, and the next ones begin, where disks like it
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


class RangeSource:
    """A file of the Hub as a :class:`~port_kit.checkpoint.byte_sources.ByteSource`, read by ranged requests."""

    def __init__(self, hub: HubClient, spec: FileSpec) -> None:
        self._hub, self._spec = hub, spec
        self.name = f"{spec.repo_id}/{spec.path}"
        self.size = spec.size

    def read_at(self, offset: int, length: int) -> bytes:
        """See :class:`~port_kit.checkpoint.byte_sources.ByteSource`.

        Raises:
            DownloadError: ``convert_layout`` if the server sends the whole file instead of ranges.
        """
        end, found = min(offset + length, self.size), bytearray()
        while (position := offset + len(found)) < end:
            try:
                what = f"reading the directory of {self.name}"
                found += self._hub.http.retrying(what, partial(self._ask, position, end))
            except DownloadError as error:
                if not isinstance(error.__cause__, _RangesIgnored):
                    raise
                raise DownloadError(
                    f"{self.name} cannot be read in parts: {error.__cause__}",
                    code="convert_layout",
                    hint="use another endpoint, or download it as it is and convert it on disk: --keep-original",
                ) from error
        return bytes(found)

    def _ask(self, offset: int, end: int) -> bytes:
        spec = self._spec
        headers = {"Range": f"bytes={offset}-{end - 1}"}
        with self._hub.open(spec.repo_id, spec.commit, spec.path, headers) as response:
            if response.status == 200:
                raise _RangesIgnored("the server ignores ranges and sends the whole file")
            if response.status != 206:
                raise TransportError(f"HTTP {response.status} instead of a range")
            count = _length_of_range(response, offset, end, self.size)
            body = response.read_all()
            if len(body) < count:
                raise TransportError(f"a range of {count} bytes has {len(body)}")
            return body[:count]
