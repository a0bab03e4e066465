"""Tables of MP4 files, read before FFmpeg makes its list of packets from them.

A table of some bytes can state any number of packets, each of which takes 24 bytes of memory in FFmpeg: a run of a
fragment has no byte for each of its packets, a table says for all chunks how many are in each, and every edit repeats
the packets of its track. FFmpeg reads a table wherever it is. So :func:`read_mp4` searches everything but the media
data for the names of tables; those outside of a track are counted to each track.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

#: Packets of all tracks; ten minutes of AAC have 30,000.
MAX_PACKETS = 2**20
#: Boxes and tables of a file; kinds of samples of a track.
MAX_BOXES, MAX_FORMATS = 2**16, 16
#: Samples of a packet of ALAC, for which FFmpeg reserves memory; encoders write 4096.
MAX_ALAC_SAMPLES = 2**16
#: FFmpeg's own limit; a larger number is no header of ALAC, but the name of another box.
_LARGEST_ALAC = 2**24
#: Plain samples that FFmpeg puts into one packet.
_PLAIN_PACKET = 1024
_TABLES = re.compile(rb"hdlr|mdhd|stsd|stts|stsc|stsz|stz2|stco|co64|elst|trun|alac")
_UNKNOWN = (0, 2**32 - 1, 2**64 - 1)


@dataclass
class _Track:
    """Contents of the tables of a track.

    Attributes:
        formats: rate in Hz and channels of each kind of samples.
        seconds: length, None if it is unknown.
        scale: ticks of a second.
        is_audio: True for sound.
        is_plain: True if each sample lasts one tick: FFmpeg makes packets of :data:`_PLAIN_PACKET` of them. None if no
            table states it.
        samples, chunks, edits, runs: numbers of entries.
        per_chunk: most samples of a chunk.
    """

    formats: list[tuple[float, int]] = field(default_factory=list)
    seconds: float | None = None
    scale: int = 0
    is_audio: bool = False
    is_plain: bool | None = None
    samples: int = 0
    chunks: int = 0
    edits: int = 0
    runs: int = 0
    per_chunk: int = 0

    def packets(self, other: _Track) -> int:
        """Return the most packets that FFmpeg lists for a track and the tables outside of tracks."""
        chunks, edits = self.chunks + other.chunks, self.edits + other.edits
        in_chunks = chunks * max(self.per_chunk, other.per_chunk)
        if {self.is_plain, other.is_plain} - {None} == {True}:
            return (chunks + in_chunks // _PLAIN_PACKET) * max(1, edits)
        return min(self.samples + other.samples, in_chunks) * max(1, edits)


def read_mp4(file: BinaryIO, size: int) -> list[tuple[float, int, int | None]]:
    """Return rate, channels and samples per channel (None if not stated) of each kind of samples of audio tracks.

    Args:
        file: anywhere.
        size: bytes of the file.

    Raises:
        ValueError: it states more than :data:`MAX_PACKETS`, or has too many boxes.
    """
    outside, tracks = _Track(), []
    for kind, data in _header_boxes(file, size):
        ends = []
        for start, end in _tracks(data) if kind == b"moov" else ():
            tracks.append(_read_tables(data, start, end, _Track()))
            ends.append((start, end))
        for start, end in zip([0, *(end for _, end in ends)], [*(start for start, _ in ends), len(data)], strict=True):
            _read_tables(data, start, end, outside)
    packets = sum(track.packets(outside) for track in tracks or [_Track()])
    packets += outside.runs + sum(track.runs for track in tracks)
    if packets > MAX_PACKETS:
        raise ValueError(f"its tables state up to {packets} packets; at most {MAX_PACKETS} are read")
    found: list[tuple[float, int, int | None]] = []
    for track in tracks:
        for rate, channels in track.formats if track.is_audio else ():
            rate = rate or track.scale
            found.append((rate, channels, None if track.seconds is None else int(track.seconds * rate)))
    return found


def _header_boxes(file: BinaryIO, size: int) -> Iterator[tuple[bytes, bytes]]:
    """Yield the kinds and contents of the outermost boxes, but for media data."""
    start = 0
    for _ in range(MAX_BOXES):
        file.seek(start)
        found = _box(file.read(16), 0, size - start)
        if found is None:
            return
        kind, body, end = found
        if kind != b"mdat":
            file.seek(start + body)
            yield kind, file.read(end - body)
        start += end
    raise ValueError(f"it has more than {MAX_BOXES} boxes")


def _tracks(data: bytes) -> Iterator[tuple[int, int]]:
    """Yield where the tracks in the content of a ``moov`` box begin and end."""
    start = 0
    for _ in range(MAX_BOXES):
        found = _box(data[start : start + 16], 0, len(data) - start)
        if found is None:
            return
        kind, body, end = found
        if kind == b"trak":
            yield start + body, start + end
        start += end
    raise ValueError(f"it has more than {MAX_BOXES} boxes")


def _box(head: bytes, start: int, limit: int) -> tuple[bytes, int, int] | None:
    """Return the kind of a box, and where its content begins and ends, as FFmpeg reads them; None at the end."""
    if len(head) < 8:
        return None
    length, kind = struct.unpack(">I4s", head[:8])
    body = start + 8
    if length == 1 and len(head) == 16:
        length, body = int.from_bytes(head[8:16], "big"), start + 16
    if length == 0:
        length = limit
    return (kind, body, min(start + length, limit)) if start + length >= body else None


def _read_tables(data: bytes, start: int, end: int, track: _Track) -> _Track:
    """Add the tables in a part of the content of a box to a track."""
    for count, match in enumerate(_TABLES.finditer(data, start, end)):
        if count == MAX_BOXES:
            raise ValueError(f"it has more than {MAX_BOXES} tables")
        body = match.end() + (8 if data[max(0, match.start() - 4) : match.start()] == b"\0\0\0\1" else 0)
        _read_table(match[0], data, body, track)
    return track


def _read_table(kind: bytes, data: bytes, body: int, track: _Track) -> None:
    first, second, third = (_number(data, body + 4 * place) for place in (1, 2, 3))
    entries = max(0, len(data) - body - 8)
    if kind == b"hdlr":
        track.is_audio = track.is_audio or data[body + 8 : body + 12] == b"soun"
    elif kind == b"mdhd":
        _read_length(data, body, track)
    elif kind == b"stsd":
        track.formats += _formats(data, body + 8, min(first, MAX_FORMATS))
    elif kind == b"stts":
        track.is_plain = track.is_plain is not False and (first, third) == (1, 1)
    elif kind in (b"stsz", b"stz2"):
        track.samples += second
    elif kind in (b"stco", b"co64"):
        track.chunks += min(first, entries // (4 if kind == b"stco" else 8))
    elif kind == b"stsc":
        counts = data[body + 8 : body + 8 + 12 * first]
        most = max((each[1] for each in struct.iter_unpack(">III", counts[: len(counts) // 12 * 12])), default=0)
        track.per_chunk = max(track.per_chunk, most)
    elif kind == b"elst":
        track.edits += min(first, entries // 12)
    elif kind == b"trun":
        track.runs += first
    elif MAX_ALAC_SAMPLES < first <= _LARGEST_ALAC:
        raise ValueError(f"a packet of ALAC has {first} samples; at most {MAX_ALAC_SAMPLES} are read")


def _number(data: bytes, place: int) -> int:
    return int.from_bytes(data[place : place + 4], "big")


def _read_length(data: bytes, body: int, track: _Track) -> None:
    """Read the length of a track from ``mdhd``, whose second version has times of 64 bits."""
    is_long = data[body : body + 1] == b"\1"
    track.scale = _number(data, body + (20 if is_long else 12))
    ticks = int.from_bytes(data[body + 24 : body + 32], "big") if is_long else _number(data, body + 16)
    track.seconds = ticks / track.scale if track.scale and ticks not in _UNKNOWN else None


def _formats(data: bytes, place: int, count: int) -> Iterator[tuple[float, int]]:
    """Yield rate and channels of the kinds of samples of a sound track; those of QuickTime's version 2 are longer."""
    for _ in range(count):
        entry = data[place : place + 52]
        if len(entry) < 36:
            return
        channels, rate = int.from_bytes(entry[24:26], "big"), int.from_bytes(entry[32:34], "big")
        if entry[16:18] == b"\0\2" and len(entry) == 52:
            rate, channels = struct.unpack(">dI", entry[40:52])
        yield rate, channels
        place += max(8, int.from_bytes(entry[:4], "big"))
