"""Checks of reference images and reference audio before anything is decoded.

The checks read headers. They are the same for a path, for the bytes of a file and for decoded values, so that offline
requests, servers and pipelines accept the same references. The content decides about a format, never a file name. Only
formats that cannot refer to other files are tried.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from port_kit.audio_headers import AudioHeader, read_headers
from port_kit.errors import InputError
from port_kit.escape import quoted, reason_of, shortened

if TYPE_CHECKING:
    from av.container import InputContainer
    from PIL import Image

#: Formats of images, as Pillow names them; MPO is a JPEG with previews.
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP")
_DECODED_FORMATS = (None, "MPO", *IMAGE_FORMATS)
#: Suffixes of image files by their first bytes; formats that are not read have one for messages.
_SUFFIXES = {
    b"\x89PNG": ".png",
    b"\xff\xd8\xff": ".jpg",
    b"GIF8": ".gif",
    b"BM": ".bmp",
    b"II*\0": ".tif",
    b"MM\0*": ".tif",
}
#: Brands of MP4 files that hold images.
_IMAGE_BRANDS = {
    b"avif": ".avif",
    b"avis": ".avif",
    b"heic": ".heic",
    b"heix": ".heic",
    b"mif1": ".heif",
    b"msf1": ".heif",
}
#: Pixels of an image: the size of the pictures of current cameras and phones.
MAX_PIXELS = 2**25
#: Pixels of a side, as in JPEG: filters for downscaling take memory by the side.
MAX_SIDE = 65_535
#: Scans of a JPEG: a scan of 75 bytes takes as long to decode as the whole picture, and encoders write up to 20.
MAX_SCANS = 32
#: Markers of a JPEG: start of a scan, end of the image, and those that begin neither a segment nor a scan.
_SCAN, _END, _MARKER = 0xDA, 0xD9, re.compile(rb"\xff([^\x00\xd0-\xd8\xff])")
#: Bytes of an encoded image and of an encoded audio.
MAX_IMAGE_BYTES, MAX_AUDIO_BYTES = 2**27, 2**28
#: Seconds of an audio. Ports use the beginning.
MAX_AUDIO_SECONDS = 600.0
MAX_AUDIO_CHANNELS = 8
MIN_AUDIO_RATE, MAX_AUDIO_RATE = 1_000, 768_000  # Hz
#: FFmpeg's demuxer per container.
AUDIO_CONTAINERS = {"wav": "wav", "mp3": "mp3", "flac": "flac", "ogg": "ogg", "mp4": "mov"}
#: A compressed header of an MP4 file.
_COMPRESSED = re.compile(rb"cmov.{4}dcomzlib.{4}cmvd", re.DOTALL)
_CODECS = ("pcm_", "adpcm_", "mp3", "flac", "vorbis", "opus", "aac", "alac")

Source = str | Path | bytes | BinaryIO


@dataclass(frozen=True)
class AudioFacts:
    """Header of an audio.

    Attributes:
        container: one of :data:`AUDIO_CONTAINERS`.
        seconds: length by the header; decoding may show another one.
        rate: Hz.
        channels: number of channels.
    """

    container: str
    seconds: float
    rate: int
    channels: int


def check_image(source: object, *, name: str) -> Image.Image:
    """Return a reference image, not decoded.

    Args:
        source: a path, the bytes of a file, a binary file, a PIL image, or a uint8 array (H, W, 3).
        name: name in error messages.

    Raises:
        InputError: the type or the format is not supported, or the image is unreadable or too large.
    """
    import numpy as np
    from PIL import Image

    if isinstance(source, np.ndarray):
        source = _image_of_array(source, name)
    if isinstance(source, Image.Image):
        if source.format not in _DECODED_FORMATS:
            raise _unsupported(name, source.format, IMAGE_FORMATS)
        check_pixels(source.width, source.height, name=name)
        _check_single(source, name)
        return source
    content = _content(source, name)
    if (size := _webp_size(content[:30])) is not None:  # Pillow allocates the whole picture before it reports its size
        check_pixels(*size, name=name)
    if _count_scans(content) > MAX_SCANS:
        raise _too_large(name, f"it has more than {MAX_SCANS} scans")
    try:
        image = Image.open(io.BytesIO(content), formats=IMAGE_FORMATS)
    except Image.DecompressionBombError as error:
        raise _too_large(name, reason_of(error)) from error
    except Image.UnidentifiedImageError as error:
        found = (image_suffix(content[:12]) or "").removeprefix(".").upper()
        if found.replace("JPG", "JPEG") in IMAGE_FORMATS:
            raise unreadable(name, f"it is no complete {found} file") from error
        raise _unsupported(name, found or None, IMAGE_FORMATS) from error
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        raise unreadable(name, error) from error
    check_pixels(image.width, image.height, name=name)
    _check_single(image, name)
    return image


def to_rgb(image: Image.Image, *, name: str) -> Image.Image:
    """Decode an image of :func:`check_image` to RGB; transparency and EXIF's orientation are not applied.

    Raises:
        InputError: the image is corrupt, or its pixels have more than 8 bits, which Pillow would clip.
    """
    if image.mode.startswith(("I", "F")):
        raise InputError(
            f"{name} has pixels of the mode {image.mode}; 8 bits per channel are required",
            code="input_type",
            hint="convert it to 8 bits per channel",
        )
    try:
        return image.convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:
        raise unreadable(name, error) from error


def image_suffix(head: bytes) -> str | None:
    """Return the usual suffix of an image file by its first 12 bytes; None if it is no image."""
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return ".webp"
    if head[4:8] == b"ftyp":
        return _IMAGE_BRANDS.get(head[8:12])
    return next((suffix for magic, suffix in _SUFFIXES.items() if head.startswith(magic)), None)


def check_pixels(width: int, height: int, *, name: str) -> None:
    """Raise InputError if an image has no pixels, more than :data:`MAX_PIXELS`, or a side beyond :data:`MAX_SIDE`."""
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        most = f"at most {MAX_PIXELS}, and {MAX_SIDE} a side, are accepted"
        raise _too_large(name, f"it has {width}x{height} pixels; {most}")
    if not width * height:
        raise InputError(f"{name} has {width}x{height} pixels", code="input_type")


def _check_single(image: Image.Image, name: str) -> None:
    """Refuse an animation, of which one picture would be used."""
    if image.format in ("PNG", "WEBP") and getattr(image, "is_animated", False):  # frames of an MPO are previews
        raise InputError(
            f"{name} is an animation; a single picture is required",
            code="input_unreadable",
            hint="give one of its pictures",
        )


def _image_of_array(array: Any, name: str) -> Image.Image:
    from PIL import Image

    if array.dtype != "uint8" or array.ndim != 3 or array.shape[-1] != 3 or 0 in array.shape:
        found = f"{shortened(str(array.dtype))} {array.shape}"
        raise InputError(f"{name} is an array {found}; expected uint8 (H, W, 3)", code="input_type")
    check_pixels(array.shape[1], array.shape[0], name=name)
    return Image.fromarray(array)


def _webp_size(head: bytes) -> tuple[int, int] | None:
    """Return the width and height of a WebP file by its first 30 bytes; None for other formats."""
    if head[:4] != b"RIFF" or head[8:12] != b"WEBP" or len(head) < 30:
        return None
    kind = head[12:16]
    if kind == b"VP8X":
        return int.from_bytes(head[24:27], "little") + 1, int.from_bytes(head[27:30], "little") + 1
    if kind == b"VP8L":
        bits = int.from_bytes(head[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    return int.from_bytes(head[26:28], "little") & 0x3FFF, int.from_bytes(head[28:30], "little") & 0x3FFF


def _count_scans(content: bytes) -> int:
    """Return the number of scans of a JPEG; 0 for other formats. What follows the image does not count."""
    scans, position = 0, 2
    if content[:3] != b"\xff\xd8\xff":
        return 0
    while (found := _MARKER.search(content, position)) and found[1][0] != _END:
        scans += found[1][0] == _SCAN
        position = found.end() + max(2, int.from_bytes(content[found.end() : found.end() + 2], "big"))
    return scans


def check_audio(source: object, *, name: str) -> AudioFacts:
    """Return the header of a reference audio; nothing is decoded.

    Args:
        source: a path, the bytes of a file, or a binary file, of an audio or of an MP4 video with an audio track.
        name: name in error messages.

    Raises:
        InputError: the type or the format is not supported, or the audio is unreadable or beyond the bounds.
    """
    with open_audio(source, name=name) as (_, facts):
        return facts


@contextmanager
def open_audio(source: object, *, name: str) -> Iterator[tuple[InputContainer, AudioFacts]]:
    """Open a reference audio with the demuxer of its container, after a check of its header.

    FFmpeg reads the given file only, through Python: it knows no path, and tries no other demuxer.

    Raises:
        InputError: as :func:`check_audio`; also errors of FFmpeg and of the file inside the block.
    """
    import av

    file = _opened(source, "a path, bytes, (samples, rate) or samples at 16 kHz", MAX_AUDIO_BYTES, name)
    container = _container(file.read(12))
    if container is None:
        raise _unsupported(name, None, tuple(AUDIO_CONTAINERS))
    file = _without_compressed_texts(file, container, name)
    try:
        headers = read_headers(file, container)
        for header in headers:
            check_samples(header.seconds or 0.0, header.rate, header.channels, name=name)
        with av.open(file, format=AUDIO_CONTAINERS[container]) as opened:
            yield opened, _facts(opened, container, headers, name)
    except InputError:
        raise
    except (av.FFmpegError, OSError, ValueError) as error:
        raise unreadable(name, getattr(error, "strerror", None) or error) from error


def check_samples(seconds: float, rate: float, channels: int, *, name: str) -> None:
    """Raise InputError if an audio is beyond the bounds of this module."""
    if not MIN_AUDIO_RATE <= rate <= MAX_AUDIO_RATE:
        raise InputError(
            f"{name} has the sample rate {quoted(rate)}; expected {MIN_AUDIO_RATE} to {MAX_AUDIO_RATE} Hz",
            code="input_value",
        )
    if not 1 <= channels <= MAX_AUDIO_CHANNELS:
        raise InputError(
            f"{name} has {channels} channels; 1 to {MAX_AUDIO_CHANNELS} are accepted",
            code="input_size",
            hint="mix it down to stereo or mono",
        )
    if seconds > MAX_AUDIO_SECONDS:
        raise InputError(
            f"{name} lasts {seconds:.0f} s; at most {MAX_AUDIO_SECONDS:.0f} s are accepted",
            code="input_size",
            hint="cut it",
        )


def _container(head: bytes) -> str | None:
    """Return the container of a file by its first 12 bytes; None if it is none of :data:`AUDIO_CONTAINERS`."""
    if head[:4] == b"RIFF" and head[8:12] == b"WAVE":
        return "wav"
    if head[4:8] == b"ftyp":
        return "mp4"
    if head[:4] in (b"fLaC", b"OggS"):
        return "flac" if head[:4] == b"fLaC" else "ogg"
    # The layer of an MPEG audio frame is never 0; ADTS, which starts with the same bits, has 0 there.
    frame = len(head) > 1 and head[0] == 0xFF and head[1] & 0xE0 == 0xE0 and head[1] & 0x06
    return "mp3" if head[:3] == b"ID3" or frame else None


def _without_compressed_texts(file: BinaryIO, container: str, name: str) -> BinaryIO:
    """Return an audio file without what FFmpeg would decompress in its header: 1 kB may become 1 MB there."""
    start, head = 0, b"ID3"
    while container == "mp3" and head[:3] == b"ID3":
        file.seek(start)
        head = file.read(10).ljust(10, b"\0")
        if head[:3] == b"ID3":  # 7 bits per byte are its size; a flag says that its head is repeated at its end
            size = sum((byte & 0x7F) << 7 * place for place, byte in enumerate(reversed(head[6:])))
            start += 10 + size + (10 if head[5] & 0x10 else 0)
    file.seek(start)
    if container == "mp4" and _COMPRESSED.search(file.read()):
        raise unreadable(name, "its header is compressed")
    file.seek(start)
    return io.BytesIO(file.read()) if start else file


def _facts(opened: InputContainer, container: str, headers: list[AudioHeader], name: str) -> AudioFacts:
    if not opened.streams.audio:
        raise InputError(f"{name} has no audio track", code="input_unreadable", hint="give an audio file")
    stream = opened.streams.audio[0]
    codec = stream.codec_context
    if codec is None or not codec.name.startswith(_CODECS):
        raise InputError(
            f"{name} has audio of the codec {codec.name if codec else 'unknown'}, which is not supported",
            code="input_unreadable",
            hint="convert it to WAV",
        )
    if len(headers) == 1 and headers[0].seconds is not None:
        seconds = headers[0].seconds
    elif stream.duration is not None and stream.time_base is not None:
        seconds = float(stream.duration * stream.time_base)
    else:
        seconds = (opened.duration or 0) / 1_000_000
    check_samples(seconds, codec.sample_rate, codec.channels, name=name)
    return AudioFacts(container, seconds, codec.sample_rate, codec.channels)


def _opened(source: object, expected: str, limit: int, name: str) -> BinaryIO:
    """Return a file at its start; the size of its content is at most ``limit`` bytes.

    The first bytes are read, so that a file that has no bytes, or text, is noticed here.
    """
    if isinstance(source, str | Path):
        try:
            is_file = Path(source).is_file()  # a pipe would block
            source = open(source, "rb", opener=_open_at_once) if is_file else source
        except (OSError, ValueError) as error:
            raise unreadable(name, error) from error
        if not is_file:
            raise unreadable(name, f"{quoted(str(source))} is not a file")
    file: Any = io.BytesIO(source) if isinstance(source, bytes) else source
    if not (hasattr(file, "read") and hasattr(file, "seek")):
        raise InputError(f"{name} is {type(source).__name__}; expected {expected}", code="input_type")
    try:
        file.seek(0, io.SEEK_END)
        size = file.tell()
        file.seek(0)
        first = file.read(1)
        file.seek(0)
    except Exception as error:  # an object of the caller may raise anything
        raise unreadable(name, error) from error
    if not isinstance(first, bytes):
        raise InputError(f"{name} is a file of {type(first).__name__}; expected a binary file", code="input_type")
    if size > limit:
        raise _too_large(name, f"it has {size} bytes; at most {limit} are accepted")
    opened: BinaryIO = file
    return opened


def _open_at_once(path: str, flags: int) -> int:
    """Open a file that never waits: some files of the kernel would, like a pipe."""
    return os.open(path, flags | os.O_NONBLOCK)


def _content(source: object, name: str) -> bytes:
    """Return the content of the file of an image."""
    expected = "a path, bytes, a PIL image or a uint8 array (H, W, 3)"
    file = _opened(source, expected, MAX_IMAGE_BYTES, name)
    try:
        content = file.read(MAX_IMAGE_BYTES + 1)  # devices and files that grow have more than their size
    except Exception as error:  # as above
        raise unreadable(name, error) from error
    finally:
        if isinstance(source, str | Path):
            file.close()
    if len(content) > MAX_IMAGE_BYTES:
        raise _too_large(name, f"it has more than {MAX_IMAGE_BYTES} bytes")
    return content


def unreadable(name: str, error: BaseException | str) -> InputError:
    """Return the error of a reference that cannot be read."""
    return InputError(
        f"{name} cannot be read: {reason_of(error, 200) if isinstance(error, BaseException) else error}",
        code="input_unreadable",
        hint="check that the file exists and opens in a viewer or player",
    )


def _unsupported(name: str, found: str | None, expected: tuple[str, ...]) -> InputError:
    kind = f"is {found}" if found else "has an unknown format"
    return InputError(
        f"{name} {kind}; expected one of {', '.join(expected).upper()}",
        code="input_unreadable",
        hint="convert it to one of these formats",
    )


def _too_large(name: str, problem: str) -> InputError:
    return InputError(f"{name} is too large: {problem}", code="input_size", hint="scale it down")
