"""Golden data in one small archive: ``python tests/golden_archive.py pack FOLDER ARCHIVE`` and ``unpack``.

Weights and activations hardly compress as they lie, since the few predictable bits of each float (its exponent) are
spread over the file. Files are therefore stored byte plane by byte plane (all first bytes, all second bytes, ...)
inside a tar, and the tar is compressed with LZMA. Unpacking restores every file bit for bit.
"""

from __future__ import annotations

import hashlib
import io
import json
import lzma
import os
import sys
import tarfile
from pathlib import Path

#: Width in bytes of the numbers that fill files of a kind; other files are stored as they are.
_WIDTHS = {".pth": 4, ".pt": 4, ".wav": 2}


def pack(folder: Path, archive: Path) -> None:
    """Write all files below ``folder`` into ``archive``, reproducibly (no times, no owners, sorted)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            data = path.read_bytes()
            width = _word_width(path.suffix, data)
            info = tarfile.TarInfo(f"{width}/{path.relative_to(folder).as_posix()}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(_planes(data, width)))
    archive.write_bytes(lzma.compress(buffer.getvalue(), preset=9 | lzma.PRESET_EXTREME))


def unpack(archive: Path, folder: Path) -> Path:
    """Restore the files of ``archive`` below ``folder``/<digest>, once; safe when several processes do it at a time."""
    data = archive.read_bytes()
    target = folder / hashlib.sha256(data).hexdigest()[:16]
    if target.is_dir():
        return target
    partial = folder / f".{target.name}.{os.getpid()}"
    with tarfile.open(fileobj=io.BytesIO(lzma.decompress(data))) as tar:
        for member in tar:
            width, _, name = member.name.partition("/")
            path = partial / name
            path.parent.mkdir(parents=True, exist_ok=True)
            stream = tar.extractfile(member)
            assert stream is not None
            path.write_bytes(_rows(stream.read(), int(width)))
    try:
        partial.rename(target)
    except OSError:
        if not target.is_dir():
            raise
    return target


def _word_width(suffix: str, data: bytes) -> int:
    if suffix != ".safetensors":
        return _WIDTHS.get(suffix, 1)
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    half = sum(entry["dtype"] in ("BF16", "F16") for name, entry in header.items() if name != "__metadata__")
    return 2 if 2 * half > len(header) else 4


def _planes(data: bytes, width: int) -> bytes:
    whole = len(data) - len(data) % width
    return b"".join(data[i:whole:width] for i in range(width)) + data[whole:]


def _rows(data: bytes, width: int) -> bytes:
    rows = len(data) // width
    out = bytearray(data)
    for i in range(width):
        out[i : rows * width : width] = data[i * rows : (i + 1) * rows]
    return bytes(out)


if __name__ == "__main__":
    verb, source, target = sys.argv[1:]
    {"pack": pack, "unpack": unpack}[verb](Path(source), Path(target))
