"""Segments of a file from the Hub, and a file of the Hub read by offset."""

from __future__ import annotations

import re
from collections.abc import Callable

from port_kit.download.http import Response, TransportError, network_error
from port_kit.download.hub import HubClient
from port_kit.download.landing import Damaged, Landing
from port_kit.download.parts import ALIGNMENT, Identity, Segment
from port_kit.errors import DownloadError

_PROGRESS = 1 << 16  # bytes since the last break: with less, a server that drips would keep a download busy for ever
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")


def fetch_segment(hub: HubClient, landing: Landing, segment: Segment, advance: Callable[[int], None]) -> None:
    """Bring what is missing of a segment, in as many attempts as make progress.

    Raises:
        DownloadError: the network or the Hub's refusal.
        Damaged: the file has changed under the transfer.
    """
    what = f"{landing.identity.repo_id}/{landing.identity.path}"
    policy, attempts = hub.http.policy, 0
    enough = min(_PROGRESS, (segment.end - segment.start) // 8 or 1)
    before = segment.position
    while not segment.is_complete:
        try:
            _stream(hub, landing, segment, advance)
        except TransportError as error:
            attempts += 1
            if segment.position >= before + enough:
                before, attempts = segment.position, 1
            landing.location = None
            if attempts >= policy.attempts:
                raise network_error(f"fetching {what}", error, attempts) from error
            hub.http.sleep(policy.pause(attempts))


def _stream(hub: HubClient, landing: Landing, segment: Segment, advance: Callable[[int], None]) -> None:
    """One attempt: one request, and what comes of it."""
    size, position = landing.identity.size, segment.position
    headers = {}
    if (position, segment.end) != (0, size):
        headers["Range"] = f"bytes={position}-{segment.end - 1}"
        etag = landing.part.meta.get("etag")
        if etag:
            headers["If-Range"] = etag
    with _open(hub, landing, headers) as response:
        encoding = response.headers.get("Content-Encoding") or "identity"
        if encoding != "identity":
            raise Damaged(f"the server sends it in {encoding[:40]} encoding, which was not asked for")
        if response.status == 206:
            _require_range(response, position, size)
            _copy(response, landing, position, advance)
        elif response.status == 200:
            _require_same(response, landing)
            with landing.whole:
                if not segment.is_complete:
                    landing.rewritten = landing.rewritten or bool(headers)
                    _copy(response, landing, 0, advance)
        else:
            raise Damaged(f"the server answers HTTP {response.status} to the range from {position}")


def _open(hub: HubClient, landing: Landing, headers: dict[str, str]) -> Response:
    """Ask where the last answer was redirected to; when that place refuses (signatures age), ask the Hub again."""
    identity, location = landing.identity, landing.location
    try:
        response = hub.open(identity.repo_id, identity.commit, identity.path, headers, location)
    except DownloadError as error:
        if location is None:
            raise
        raise TransportError(str(error)) from error
    landing.location = response.url
    return response


def _require_range(response: Response, position: int, size: int) -> None:
    found = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range") or "")
    if found is None or int(found[1]) != position or found[3] not in (str(size), "*"):
        said = response.headers.get("Content-Range")
        response.close()
        raise TransportError(f"asked for bytes from {position} of {size}, the server sends {said!r}")


def _require_same(response: Response, landing: Landing) -> None:
    """The whole file where a range was asked for: the server ignores ranges, or the file is another one now."""
    etag, known = response.headers.get("ETag"), landing.part.meta.get("etag")
    size = landing.identity.size
    if response.length not in (None, size):
        raise Damaged(f"the server sends {response.length} bytes, the repository states {size}")
    if known and etag != known and landing.part.written:
        raise Damaged(f"its ETag was {known} and is {etag} now")


def _copy(response: Response, landing: Landing, offset: int, advance: Callable[[int], None]) -> None:
    etag = response.headers.get("ETag")
    if etag and not etag.startswith("W/"):
        landing.part.save(etag=etag)
    size = landing.identity.size
    while True:
        piece = landing.take()
        begin = offset % ALIGNMENT  # so that pieces end, and the next ones begin, where disks like it
        count = response.read_into(piece.buffer[begin:])
        if offset + count > size:
            raise Damaged(f"more than the {size} bytes arrive that the repository states")
        advance(landing.write(offset, piece, begin, count))
        if not count:
            return
        offset += count


class RangeSource:
    """A file of the Hub as a :class:`~port_kit.checkpoint.byte_sources.ByteSource`: each read is one ranged request."""

    def __init__(self, hub: HubClient, identity: Identity) -> None:
        self._hub, self._identity = hub, identity
        self.name = f"{identity.repo_id}/{identity.path}"
        self.size = identity.size

    def read_at(self, offset: int, length: int) -> bytes:
        """See :class:`~port_kit.checkpoint.byte_sources.ByteSource`."""
        end = min(offset + length, self.size)
        if end <= offset:
            return b""
        identity = self._identity

        def ask() -> bytes:
            headers = {"Range": f"bytes={offset}-{end - 1}"}
            with self._hub.open(identity.repo_id, identity.commit, identity.path, headers) as response:
                if response.status != 206:
                    raise TransportError(f"HTTP {response.status} instead of a range")
                _require_range(response, offset, self.size)
                return response.read_all()

        return self._hub.http.retrying(f"reading the directory of {self.name}", ask)
