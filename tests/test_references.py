"""Checks of reference media by their headers."""

from __future__ import annotations

import io
import os
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from port_kit.errors import InputError
from port_kit.references import (
    MAX_AUDIO_CHANNELS,
    MAX_AUDIO_SECONDS,
    MAX_PIXELS,
    MAX_SCANS,
    MAX_SIDE,
    check_audio,
    check_image,
    open_audio,
    to_rgb,
)
from tests.helpers import raises

TONE = (0.3 * np.sin(np.arange(32_000) / 6)).astype(np.float32)
LARGE = 5800  # pixels a side: 5800 * 5800 is more than MAX_PIXELS


def png_header(width: int, height: int) -> bytes:
    """A PNG of any size in a few bytes: its header, and pixel data that nobody should read."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def encoded(kind: str, **options: Any) -> bytes:
    """A small picture in a format."""
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), (9, 80, 200)).save(buffer, kind, **options)
    return buffer.getvalue()


def sound(container: str, codec: str, *, rate: int = 16_000, layout: str = "mono", samples: np.ndarray = TONE) -> bytes:
    """A file of samples (S,) at 16 kHz, by default two seconds of a tone."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as file:
        stream = file.add_stream(codec, rate=rate, layout=layout)
        frame = av.AudioFrame.from_ndarray(
            np.tile(samples, (len(av.AudioLayout(layout).channels), 1)), format="fltp", layout=layout
        )
        frame.sample_rate = 16_000
        for resampled in av.AudioResampler(stream.format, layout, rate).resample(frame):
            file.mux(stream.encode(resampled))
        file.mux(stream.encode())
    return buffer.getvalue()


def test_an_image_is_taken_in_any_form(tmp_path: Path) -> None:
    for kind in ("PNG", "JPEG", "WEBP"):
        data, path = encoded(kind), tmp_path / "picture.bin"
        path.write_bytes(data)
        for source in (data, path, str(path), io.BytesIO(data), Image.open(path)):
            assert (check_image(source, name="image").size, check_image(source, name="image").format) == (
                (40, 30),
                kind,
            )
    assert check_image(encoded("WEBP", lossless=True), name="image").size == (40, 30)
    assert check_image(np.zeros((30, 40, 3), np.uint8), name="image").size == (40, 30)
    assert check_image(Image.new("L", (40, 30)), name="image").size == (40, 30)


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "EPS", "PPM", "PDF", "ICO"])
def test_other_formats_are_refused_whatever_their_name(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(encoded(kind))
    with raises("input_unreadable", "expected one of PNG, JPEG, WEBP"):
        check_image(path, name="image")
    if kind in ("GIF", "EPS"):
        with raises("input_unreadable", f"is {kind}"):
            check_image(Image.open(path), name="image")


@pytest.mark.parametrize(
    "make",
    [
        lambda: png_header(LARGE, LARGE),
        lambda: io.BytesIO(png_header(100_000, 100_000)),
        lambda: png_header(MAX_SIDE + 1, 1),
        lambda: png_header(1, MAX_SIDE + 1),
        lambda: Image.open(io.BytesIO(png_header(LARGE, LARGE))),
        lambda: np.broadcast_to(np.zeros((1, 1, 3), np.uint8), (LARGE, LARGE, 3)),
        lambda: b"RIFF\0\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0" + b"\xff\x3f\0" * 2 + b"\0" * 64,
        lambda: b"RIFF\0\0\0\0WEBPVP8L\0\0\0\0\x2f\xff\xff\xff\x0f" + b"\0" * 64,
        lambda: b"RIFF\0\0\0\0WEBPVP8 \0\0\0\0\0\0\0\x9d\x01\x2a\xff\x3f\xff\x3f" + b"\0" * 64,
    ],
)
def test_a_large_image_is_refused_by_its_header_alone(make: Callable[[], Any]) -> None:
    assert LARGE * LARGE > MAX_PIXELS
    source = make()
    tracemalloc.start()
    try:
        with raises("input_size", "image 2"):
            check_image(source, name="image 2")
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()


def test_scans_of_a_jpeg_are_bounded() -> None:
    """What follows the image, such as a video, does not count, and neither does a thumbnail before it."""
    data = encoded("JPEG", progressive=True, exif=b"Exif\0\0" + encoded("JPEG") * 20)
    start = data.rfind(b"\xff\xc4", 0, data.rfind(b"\xff\xda"))
    tables, end = data[start:-2], b"\xff\xd9"
    for count in (0, 10):
        taken = data[:-2] + tables * count + end + b"\xff\xda" * 100
        assert check_image(taken, name="image").convert("RGB").size == (40, 30)
    with raises("input_size", f"more than {MAX_SCANS} scans"):
        check_image(data[:-2] + tables * MAX_SCANS + end, name="image")
    check_image(b"\xff\xd8\xff" + b"\xff" * 2**20 + data[3:], name="image")  # filling, read once


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_an_animation_is_refused(kind: str) -> None:
    data = encoded(kind, save_all=True, append_images=[Image.new("RGB", (40, 30))])
    for source in (data, Image.open(io.BytesIO(data))):
        with raises("input_unreadable", "image 2 is an animation"):
            check_image(source, name="image 2")
    previews = encoded("MPO", save_all=True, append_images=[Image.new("RGB", (40, 30))])
    assert check_image(previews, name="image").size == (40, 30)


@pytest.mark.parametrize("kind", [np.uint16, np.int32, np.float32])
def test_pixels_of_more_than_8_bits_are_refused(kind: Any) -> None:
    """Pillow clips them: all but the darkest become white."""
    image = Image.fromarray(np.full((30, 40), 300, kind))
    sources: list[Any] = [image]
    if kind is np.uint16:
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        sources.append(buffer.getvalue())
    for source in sources:
        with raises("input_type", "image 2", "8 bits"):
            to_rgb(check_image(source, name="image 2"), name="image 2")


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for check in (check_image, check_audio):
        for path in (tmp_path / "pipe", tmp_path, "\0", tmp_path / "missing"):
            with raises("input_unreadable"):
                check(path, name="reference")
        for source in (3, None, [], object()):
            with raises("input_type"):
                check(source, name="reference")


class Strange:
    """A file object that reads anything."""

    def __init__(self, given: object) -> None:
        self.given = given

    def read(self, size: int = -1) -> object:
        if isinstance(self.given, Exception):
            raise self.given
        return self.given

    def seek(self, *_: int) -> int:
        return 0

    tell = seek


def test_a_file_that_gives_no_bytes_is_named(tmp_path: Path) -> None:
    closed = io.BytesIO(b"x")
    closed.close()
    (tmp_path / "text").write_text("x")
    wrong: list[Any] = [Strange(None), Strange("x"), Strange(3), io.StringIO("x"), (tmp_path / "text").open()]
    unreadable: list[Any] = [closed, (tmp_path / "new").open("wb"), Strange(RuntimeError("x" * 10**6))]
    unreadable += ["/proc/self/mem", "x" * 10**6, "data:image/png;base64," + "A" * 10**6, "\ud800"]
    for code, sources in (("input_type", wrong), ("input_unreadable", unreadable)):
        for source in sources:
            for check in (check_image, check_audio):
                with raises(code, "reference 2") as caught:
                    check(source, name="reference 2")
                assert len(caught.value.message) < 300


def test_a_device_without_an_end_is_no_image() -> None:
    with open("/dev/zero", "rb") as file, raises("input_size", "image 2"):
        check_image(file, name="image 2")


@pytest.mark.parametrize(
    ("container", "format_", "codec"),
    [
        ("wav", "wav", "pcm_s16le"),
        ("mp3", "mp3", "libmp3lame"),
        ("flac", "flac", "flac"),
        ("ogg", "ogg", "libopus"),
        ("mp4", "ipod", "aac"),
    ],
)
def test_audio_of_each_container_is_taken(container: str, format_: str, codec: str, tmp_path: Path) -> None:
    rate = 48_000 if codec == "libopus" else 16_000
    data, path = sound(format_, codec, rate=rate, layout="stereo"), tmp_path / "voice.bin"
    path.write_bytes(data)
    for source in (data, path, io.BytesIO(data)):
        facts = check_audio(source, name="voice")
        assert (facts.container, facts.rate, facts.channels) == (container, rate, 2)
        assert abs(facts.seconds - 2.0) < 0.1


SCRIPTS = {
    "ffconcat": "ffconcat version 1.0\nfile other.wav\n",
    "HLS": "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nother.wav\n#EXT-X-ENDLIST\n",
    "SDP": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=audio 1234 RTP/AVP 0\n",
    "DASH": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011"><BaseURL>other.wav</BaseURL></MPD>',
}


def test_texts_of_an_mp3_are_not_decompressed() -> None:
    """FFmpeg would keep 3 MB of each text, of 3 kB of the file."""

    def size_of(data: bytes) -> bytes:
        return bytes(len(data) >> shift & 0x7F for shift in (21, 14, 7, 0))

    text = b"\3key\0" + b"a" * 3_000_000
    packed = size_of(text) + zlib.compress(text)
    frames = (b"TXXX" + size_of(packed) + b"\0\x09" + packed) * 10
    tag = b"ID3\4\0\0" + size_of(frames) + frames
    plain = sound("mp3", "libmp3lame")
    wanted = check_audio(plain, name="audio")
    for data in (tag + plain, tag + tag + plain, tag[:5] + b"\x10" + tag[6:] + b"3DI" + tag[3:10] + plain):
        with open_audio(data, name="audio") as (opened, facts):
            assert facts == wanted
            assert sum(map(len, opened.metadata.values())) < 1000
    with raises("input_unreadable", "audio 2"):
        check_audio(tag[:-10], name="audio 2")


def test_an_mp4_with_a_compressed_header_is_refused() -> None:
    packed = zlib.compress(bytes(2**20))
    data = struct.pack(">I4s", len(packed) + 12, b"cmvd") + struct.pack(">I", 2**20) + packed
    data = struct.pack(">I4s4s", 12, b"dcom", b"zlib") + data
    data = struct.pack(">I4s", len(data) + 8, b"cmov") + data
    head = struct.pack(">I4s4sI", 16, b"ftyp", b"qt  ", 0)
    with raises("input_unreadable", "audio 2", "compressed"):
        check_audio(head + struct.pack(">I4s", len(data) + 8, b"moov") + data, name="audio 2")


@pytest.mark.parametrize("kind", SCRIPTS)
@pytest.mark.parametrize("head", [b"", b"ID3", b"OggS", b"fLaC", b"RIFF\0\0\0\0WAVE", b"\0\0\0\x18ftyp"])
def test_a_script_never_reads_another_file(kind: str, head: bytes, tmp_path: Path) -> None:
    (tmp_path / "other.wav").write_bytes(sound("wav", "pcm_s16le"))
    path = tmp_path / "voice.wav"
    path.write_bytes(head + SCRIPTS[kind].encode())
    for source in (path, path.read_bytes()):
        with raises("input_unreadable"):
            check_audio(source, name="voice")


def wav_header(seconds: float, *, rate: int = 16_000, channels: int = 1) -> bytes:
    """A silent WAV of 8-bit samples."""
    size = int(seconds * rate * channels)
    return struct.pack(
        "<4sI4s4sIHHIIHH4sI", b"RIFF", size + 36, b"WAVE", b"fmt ", 16, 1, channels, rate, rate * channels, channels, 8,
        b"data", size,
    ) + bytes(size)  # fmt: skip


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (wav_header(MAX_AUDIO_SECONDS + 1, rate=1000), "601 s"),
        (wav_header(1, channels=MAX_AUDIO_CHANNELS + 1), "9 channels"),
        (wav_header(1e-7, rate=2_000_000_000), "2000000000"),
    ],
)
def test_audio_beyond_the_bounds_is_refused_by_its_header(data: bytes, said: str) -> None:
    with pytest.raises(InputError, match=said):
        check_audio(data, name="voice")
