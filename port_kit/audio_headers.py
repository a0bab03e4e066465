"""Headers of audio files, read from their bytes: rate, channels and length are known before FFmpeg sees the file.

Readers raise ValueError with the reason if a file does not begin as its container requires. Codecs that are not
supported have no header here; the caller asks FFmpeg for the codec.
"""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO

from port_kit.mp4_headers import read_mp4

#: Chunks of a WAV file before its samples, and streams of an Ogg file.
MAX_CHUNKS, MAX_STREAMS = 1000, 16
#: Length of data that a program wrote which did not know it in advance.
_UNKNOWN = (0, 0xFFFFFFFF)
#: Formats of WAV whose samples have one size: integers, floats, and either with a table of channels.
_PLAIN = (1, 3, 0xFFFE)
_MPEG_RATES = {3: (44_100, 48_000, 32_000), 2: (22_050, 24_000, 16_000), 0: (11_025, 12_000, 8_000)}
_MPEG_SYNC = re.compile(rb"\xff[\xe2-\xe7\xf2-\xff][\x00-\xef]")
#: Bytes in which the first frame of an MP3 file and the last page of an Ogg file begin.
_HEAD, _TAIL = 2**16, 2**17


@dataclass(frozen=True)
class AudioHeader:
    """Properties of one audio track, as its file states them.

    Attributes:
        rate: Hz.
        channels: number of channels.
        samples: per channel; None if the file does not state it.
    """

    rate: float
    channels: int
    samples: int | None = None

    @property
    def seconds(self) -> float | None:
        """Length; None if it is not stated, or the rate is 0."""
        return self.samples / self.rate if self.samples is not None and self.rate else None


def read_headers(file: BinaryIO, container: str) -> list[AudioHeader]:
    """Return the headers of the audio tracks of a file, and leave the file at its start.

    Args:
        file: at its start.
        container: ``wav``, ``flac``, ``ogg``, ``mp3`` or ``mp4``.

    Raises:
        ValueError: the file is not of that container, or states more packets than any audio has.
    """
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    try:
        return _READERS[container](file, size)
    except (struct.error, IndexError) as error:
        raise ValueError("it is truncated") from error
    finally:
        file.seek(0)


def _wav(file: BinaryIO, size: int) -> list[AudioHeader]:
    """Read the chunks up to the samples; a length beyond the file, or an unknown one, means the rest of the file."""
    file.seek(12)
    form, data = b"", None
    for _ in range(MAX_CHUNKS):
        head = file.read(8)
        if len(head) < 8:
            break
        kind, length = struct.unpack("<4sI", head)
        start = file.tell()
        if kind == b"fmt ":
            form = form or file.read(min(length, 16))
        if kind == b"data":
            data = size - start if length in _UNKNOWN else min(length, size - start)
            break
        file.seek(start + length + length % 2)
    else:
        raise ValueError(f"it has more than {MAX_CHUNKS} chunks before its samples")
    if data is None:
        raise ValueError("it has no chunk of samples")
    tag, channels, rate, _, _, bits = struct.unpack("<HHIIHH", form)
    width = channels * ((bits + 7) // 8)
    return [AudioHeader(rate, channels, data // width if tag in _PLAIN and width else None)]


def _flac(file: BinaryIO, _size: int) -> list[AudioHeader]:
    return [_stream_info(file.read(42))]


def _stream_info(head: bytes) -> AudioHeader:
    """Read the first block of FLAC's metadata; 0 samples means that their number is unknown."""
    magic, kind, packed = struct.unpack(">4sB13xQ", head[:26])
    if magic != b"fLaC" or kind & 0x7F:
        raise ValueError("its FLAC stream does not begin with STREAMINFO")
    rate, channels, samples = packed >> 44, (packed >> 41 & 7) + 1, packed & (1 << 36) - 1
    return AudioHeader(rate, channels, samples or None)


def _ogg(file: BinaryIO, size: int) -> list[AudioHeader]:
    """Read the first page of each stream; the last page of the file states the length of its stream."""
    file.seek(max(0, size - _TAIL))
    tail = file.read(_TAIL)
    last = tail[tail.rfind(b"OggS") :]
    granule, serial = struct.unpack("<qI", last[6:18])
    file.seek(0)
    found: list[AudioHeader] = []
    for _ in range(MAX_STREAMS + 1):
        head = file.read(27)
        if head[:4] != b"OggS" or not head[5] & 2:
            return found
        length = sum(file.read(head[26]))
        header = _ogg_stream(file.read(length))
        if header is not None:
            is_last = head[14:18] == serial.to_bytes(4, "little")
            found.append(AudioHeader(header.rate, header.channels, granule if is_last and granule > 0 else None))
    raise ValueError(f"it has more than {MAX_STREAMS} streams")


def _ogg_stream(packet: bytes) -> AudioHeader | None:
    """Read the first packet of a stream; None if it is of another kind."""
    if packet.startswith(b"\x01vorbis"):
        channels, rate = struct.unpack("<BI", packet[11:16])
        return AudioHeader(rate, channels)
    if packet.startswith(b"OpusHead"):
        return AudioHeader(48_000, packet[9])
    return _stream_info(packet[9:51]) if packet.startswith(b"\x7fFLAC") else None


def _mp3(file: BinaryIO, _size: int) -> list[AudioHeader]:
    """Read the first frame, which may state the number of frames; a file without one is left to FFmpeg."""
    head = file.read(_HEAD)
    for match in _MPEG_SYNC.finditer(head):
        word = int.from_bytes(head[match.start() : match.start() + 4], "big")
        version, layer, rate_index = word >> 19 & 3, word >> 17 & 3, word >> 10 & 3
        if version == 1 or rate_index == 3:
            continue
        channels = 1 if word >> 6 & 3 == 3 else 2
        samples = 384 if layer == 3 else 576 if layer == 1 and version != 3 else 1152
        frames = _mpeg_frames(head[match.start() :], version == 3, channels)
        return [AudioHeader(_MPEG_RATES[version][rate_index], channels, frames and frames * samples)]
    return []


def _mpeg_frames(frame: bytes, is_first: bool, channels: int) -> int | None:
    """Return the number of frames that Xing's or Fraunhofer's header in the first frame states."""
    place = 4 + {(True, 2): 32, (True, 1): 17, (False, 2): 17, (False, 1): 9}[is_first, channels]
    if frame[place : place + 4] in (b"Xing", b"Info") and frame[place + 7 : place + 8] and frame[place + 7] & 1:
        return int.from_bytes(frame[place + 8 : place + 12], "big") or None
    if frame[36:40] == b"VBRI":
        return int.from_bytes(frame[50:54], "big") or None
    return None


def _mp4(file: BinaryIO, size: int) -> list[AudioHeader]:
    return [AudioHeader(*track) for track in read_mp4(file, size)]


_READERS: dict[str, Callable[[BinaryIO, int], list[AudioHeader]]] = {
    "wav": _wav,
    "flac": _flac,
    "ogg": _ogg,
    "mp3": _mp3,
    "mp4": _mp4,
}
