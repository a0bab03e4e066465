"""Small audio files made by hand, whose headers state anything."""

from __future__ import annotations

import struct
from collections.abc import Sequence


def wav(size: int, *, channels: int = 1, rate: int = 16_000, bits: int = 16, samples: bytes = bytes(64_000)) -> bytes:
    """Return a WAV file whose header states ``size`` bytes of samples."""
    width = channels * bits // 8
    head = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, channels, rate, rate * width & 0xFFFFFFFF, width & 0xFFFF, bits)
    return b"RIFF\0\0\0\0WAVE" + head + struct.pack("<4sI", b"data", size) + samples


def flac(count: int, *, channels: int = 1, rate: int = 16_000) -> bytes:
    """Return the header of a FLAC file that states ``count`` samples."""
    packed = rate << 44 | channels - 1 << 41 | 15 << 36 | count
    return b"fLaC" + struct.pack(">B3sHH6sQ16s", 0x80, b"\0\0\x22", 4096, 4096, b"", packed, b"")


def ogg(granule: int, packet: bytes, *, serial: int = 7) -> bytes:
    """Return an Ogg file with the first page of a stream and a last one."""
    first = struct.pack("<4sBBqIIIB", b"OggS", 0, 2, 0, serial, 0, 0, 1) + bytes([len(packet)]) + packet
    return first + struct.pack("<4sBBqIIIB", b"OggS", 0, 4, granule, serial, 1, 0, 1) + b"\1\0"


def opus(channels: int) -> bytes:
    """Return the first packet of an Opus stream."""
    return struct.pack("<8sBBHIhB", b"OpusHead", 1, channels, 0, 16_000, 0, 0)


def vorbis(channels: int, rate: int) -> bytes:
    """Return the first packet of a Vorbis stream."""
    return struct.pack("<7sIBIIIIBB", b"\x01vorbis", 0, channels, rate, 0, 0, 0, 0xB8, 1)


def mp3(frames: int, *, mark: bytes = b"Xing") -> bytes:
    """Return an MP3 frame of silence, mono at 16 kHz, that states a number of frames."""
    return (b"\xff\xf3\x48\xc4" + bytes(9) + mark + struct.pack(">II", 1, frames)).ljust(288, b"\0") * 2


def box(kind: bytes, *parts: bytes) -> bytes:
    """Return a box of an MP4 file."""
    content = b"".join(parts)
    return struct.pack(">I4s", len(content) + 8, kind) + content


def table(kind: bytes, *numbers: int) -> bytes:
    """Return a box of numbers of 32 bits, after its version and flags."""
    return box(kind, bytes(4), struct.pack(f">{len(numbers)}I", *numbers))


def mp4(
    *,
    ticks: int = 10_240,
    channels: int = 1,
    times: Sequence[int] = (10, 1024),
    sizes: Sequence[int] = (0, 10, *[10] * 10),
    chunks: Sequence[int] = (0,),
    per_chunk: int = 10,
    edits: int = 0,
    run: int = 0,
    codec: bytes = b"mp4a",
    inside: bytes = b"",
    outside: bytes = b"",
) -> bytes:
    """Return an MP4 file with a track of sound at 16 kHz.

    Args:
        ticks: length of the track, 16,000 ticks a second.
        channels: of its samples.
        times: pairs of a number of packets, and the ticks of each.
        sizes: of each packet or 0, their number, and the single sizes.
        chunks: places of the chunks.
        per_chunk: packets of a chunk.
        edits: number of parts of the track to play, each complete.
        run: number of packets of a fragment; 0 for no fragment.
        codec: kind of its samples.
        inside, outside: boxes after those of the kind of samples, and after the track.
    """
    entry = box(codec, bytes(6), struct.pack(">H8xHHHHI", 1, channels, 16, 0, 0, 16_000 << 16), inside)
    tables = [
        box(b"stsd", bytes(4), struct.pack(">I", 1), entry),
        table(b"stts", len(times) // 2, *times),
        table(b"stsc", 1, 1, per_chunk, 1),
        table(b"stsz", *sizes),
        table(b"stco", len(chunks), *chunks),
    ]
    media = box(
        b"mdia",
        table(b"mdhd", 0, 0, 16_000, ticks, 0),
        box(b"hdlr", bytes(8), b"soun", bytes(13)),
        box(b"minf", table(b"smhd", 0), box(b"stbl", *tables)),
    )
    played = table(b"elst", edits, *[10**6, 0, 1 << 16] * edits)
    track = box(b"trak", table(b"tkhd", 0, 0, 1, 0, 16_000, *[0] * 15), box(b"edts", played) if edits else b"", media)
    extends = box(b"mvex", table(b"trex", 1, 1, 1024, 10, 0))
    parts = table(b"tfhd", 1) + box(b"trun", struct.pack(">IIi", 1, run, 8))
    fragment = box(b"moof", table(b"mfhd", 1), box(b"traf", parts)) if run else b""
    movie = box(b"moov", table(b"mvhd", 0, 0, 1000, 1000, *[0] * 20), track, extends if run else b"", outside)
    return box(b"ftyp", b"M4A \0\0\0\0M4A ") + movie + fragment + box(b"mdat", bytes(2000))
