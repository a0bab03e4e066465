"""Headers of audio files that state wrong, huge and unknown numbers."""

from __future__ import annotations

import io
import random
import struct
from collections.abc import Callable

import pytest

from port_kit.audio_headers import MAX_CHUNKS, MAX_STREAMS, AudioHeader, read_headers
from port_kit.mp4_headers import MAX_PACKETS
from port_kit.references import check_audio
from tests.audio_files import box, flac, mp3, mp4, ogg, opus, table, vorbis, wav
from tests.helpers import raises
from tests.test_references import sound

UNKNOWN = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("container", "data", "header"),
    [
        ("wav", wav(64_000), (16_000, 1, 32_000)),
        ("wav", wav(1_000), (16_000, 1, 500)),
        ("wav", wav(0), (16_000, 1, 32_000)),
        ("wav", wav(UNKNOWN), (16_000, 1, 32_000)),
        ("wav", wav(0x7FFFFFFF, channels=4, bits=8), (16_000, 4, 16_000)),
        ("wav", wav(64_000, channels=0xFFFF, rate=UNKNOWN), (UNKNOWN, 0xFFFF, 0)),
        ("flac", flac(32_000, channels=2), (16_000, 2, 32_000)),
        ("flac", flac(0, rate=2**20 - 1), (2**20 - 1, 1, None)),
        ("flac", flac(2**36 - 1), (16_000, 1, 2**36 - 1)),
        ("ogg", ogg(96_000, opus(2)), (48_000, 2, 96_000)),
        ("ogg", ogg(-1, opus(255)), (48_000, 255, None)),
        ("ogg", ogg(2**62, vorbis(255, 2**31)), (2**31, 255, 2**62)),
        ("ogg", ogg(5, b"\x7fFLAC\1\0\0\1" + flac(0)), (16_000, 1, 5)),
        ("mp3", mp3(100), (16_000, 1, 57_600)),
        ("mp3", mp3(0, mark=b"Info"), (16_000, 1, None)),
        ("mp3", mp3(UNKNOWN), (16_000, 1, UNKNOWN * 576)),
        ("mp4", mp4(), (16_000, 1, 10_240)),
        ("mp4", mp4(ticks=0, channels=65_535), (16_000, 65_535, None)),
        ("mp4", mp4(ticks=UNKNOWN), (16_000, 1, None)),
        ("mp4", mp4(ticks=UNKNOWN - 1), (16_000, 1, UNKNOWN - 1)),
    ],
)
def test_a_header_is_read_without_a_decoder(container: str, data: bytes, header: tuple[float, int, int | None]) -> None:
    file = io.BytesIO(data)
    assert read_headers(file, container) == [AudioHeader(*header)]
    assert file.tell() == 0


@pytest.mark.parametrize(
    ("data", "code", "part"),
    [
        (wav(64_000, channels=0xFFFF), "input_size", "65535 channels"),
        (wav(64_000, rate=UNKNOWN), "input_value", "4294967295"),
        (wav(64_000, channels=0), "input_size", "0 channels"),
        (flac(2**36 - 1), "input_size", "4294967 s"),
        (flac(0, rate=0), "input_value", "sample rate 0"),
        (ogg(2**62, opus(1)), "input_size", "at most 600 s"),
        (ogg(1, opus(0)), "input_size", "0 channels"),
        (ogg(1, vorbis(255, 44_100)), "input_size", "255 channels"),
        (ogg(1, vorbis(1, 1)), "input_value", "sample rate 1;"),
        (mp3(UNKNOWN), "input_size", "at most 600 s"),
        (mp4(channels=0), "input_size", "0 channels"),
        (mp4(ticks=UNKNOWN - 1), "input_size", "268435 s"),
        (mp4(inside=table(b"alac", 2**24)), "input_unreadable", "16777216 samples"),
    ],
)
def test_numbers_out_of_range_are_refused(data: bytes, code: str, part: str) -> None:
    with raises(code, "voice", part):
        check_audio(data, name="voice")


@pytest.mark.parametrize(
    "data",
    [
        mp4(run=2**30),
        mp4(per_chunk=2**30, sizes=(10, 2**30), times=(2**30, 1024)),
        mp4(per_chunk=2**31 - 1, sizes=(2, 2**31 - 1), times=(2**31 - 1, 1), chunks=(0,) * 9),
        mp4(times=(5000, 1024), sizes=(10, 5000), per_chunk=5000, edits=5000),
        mp4(sizes=(0, 0), outside=table(b"stsz", 10, 2**30) + table(b"stsc", 1, 1, 2**30, 1)),
        mp4(inside=struct.pack(">I4sQIIII", 1, b"stsz", 28, 0, 10, 2**30, 0), per_chunk=2**30),
        mp4(outside=box(b"udta", box(b"trun", struct.pack(">III", 0x7FFFFF, 2**31, 0)))),
    ],
    ids=["fragment", "chunk", "plain samples", "edits", "outside of the track", "size of 64 bits", "in a text"],
)
def test_packets_that_take_no_byte_of_the_file_are_refused(data: bytes) -> None:
    """FFmpeg would list them: 24 bytes of memory for each."""
    assert len(data) < 100_000
    with raises("input_unreadable", "voice", f"at most {MAX_PACKETS} are read"):
        check_audio(data, name="voice")


def test_long_audio_has_fewer_packets() -> None:
    """Ten minutes of AAC, of plain samples, and of AAC in fragments."""
    size = 600 * 16_000
    packets = size // 1024
    aac = mp4(times=(packets, 1024), sizes=(0, packets, *[9] * packets), chunks=range(packets // 9), per_chunk=10)
    plain = mp4(times=(size, 1), sizes=(2, size), chunks=range(600), per_chunk=16_000, codec=b"sowt", edits=2)
    assert [read_headers(io.BytesIO(data), "mp4")[0].samples for data in (aac, plain, mp4(run=packets))] == [10_240] * 3


@pytest.mark.parametrize(
    ("container", "data", "part"),
    [
        ("wav", b"RIFF\0\0\0\0WAVE" + struct.pack("<4sI", b"junk", 0) * (MAX_CHUNKS + 1), "more than 1000 chunks"),
        ("wav", b"RIFF\0\0\0\0WAVE" + b"data" + bytes(8), "truncated"),
        ("flac", b"fLaC\1" + bytes(40), "STREAMINFO"),
        ("ogg", ogg(0, opus(1))[:47] * (MAX_STREAMS + 1) + ogg(0, opus(1)), "more than 16 streams"),
        ("mp4", box(b"free") * 70_000, "more than 65536 boxes"),
        ("mp4", box(b"moov", box(b"free") * 70_000), "more than 65536 boxes"),
        ("mp4", box(b"moov", b"elst" * 70_000), "more than 65536 tables"),
    ],
)
def test_a_structure_without_an_end_is_refused(container: str, data: bytes, part: str) -> None:
    with pytest.raises(ValueError, match=part):
        read_headers(io.BytesIO(data), container)


@pytest.mark.parametrize(
    ("container", "format_", "codec", "rate"),
    [
        ("wav", "wav", "adpcm_ima_wav", 16_000),
        ("wav", "wav", "pcm_f32le", 44_100),
        ("mp3", "mp3", "libmp3lame", 44_100),
        ("flac", "flac", "flac", 96_000),
        ("ogg", "ogg", "libopus", 48_000),
        ("mp4", "ipod", "alac", 48_000),
        ("mp4", "mov", "pcm_s16le", 16_000),
    ],
)
def test_files_of_encoders_say_what_is_in_them(container: str, format_: str, codec: str, rate: int) -> None:
    (header,) = read_headers(io.BytesIO(sound(format_, codec, rate=rate)), container)
    assert (header.rate, header.channels) == (rate, 1)
    assert header.seconds is None or abs(header.seconds - 2.0) < 0.1


SEEDS: dict[str, Callable[[], bytes]] = {
    "wav": lambda: wav(64_000)[:100],
    "flac": lambda: flac(32_000),
    "ogg": lambda: ogg(96_000, opus(1)),
    "mp3": lambda: mp3(10),
    "mp4": lambda: mp4(edits=1, run=3),
}


@pytest.mark.parametrize("container", SEEDS)
def test_a_damaged_header_is_read_or_refused(container: str) -> None:
    source, whole = random.Random(container), SEEDS[container]()
    for _ in range(2000):
        data = bytearray(whole[: source.choice((len(whole), source.randrange(len(whole))))])
        for _ in range(source.choice((0, 1, 4))):
            if data:
                place = source.randrange(len(data))
                data[place : place + source.choice((1, 4))] = source.choice((b"\0", b"\xff" * 4, source.randbytes(2)))
        try:
            found = read_headers(io.BytesIO(data), container)
        except ValueError:
            continue
        assert all(header.seconds is None or header.seconds >= 0 for header in found)
