"""Reader of the header of one tensor file: its actual format and its tensors."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from math import prod
from typing import Any

from port_kit.checkpoint.byte_sources import ByteSource
from port_kit.checkpoint.containers import LEFTOVERS, MAX_HEADER, PICKLE_SUFFIXES
from port_kit.checkpoint.pickle_reader import parse_pickle
from port_kit.dtypes import BY_WORD, ITEM_SIZES, torch_shape
from port_kit.errors import CheckpointError
from port_kit.escape import quoted
from port_kit.inspect.file_listing import FileListing
from port_kit.inspect.gguf import read_gguf
from port_kit.inspect.report import WeightFile

#: Formats by suffix; the final format if this module has no reader for it.
FORMATS = {
    ".safetensors": "safetensors",
    ".sft": "safetensors",
    **dict.fromkeys(PICKLE_SUFFIXES, "torch"),
    ".gguf": "gguf",
    ".onnx": "onnx",
    ".msgpack": "flax msgpack",
    ".h5": "keras h5",
    ".npz": "numpy npz",
    ".tflite": "tflite",
}
_FIRST_READ = 1 << 16
_LFS = b"version https://git-lfs.github.com"


def is_weights(path: str) -> bool:
    """Return True if a path is the name of a tensor file."""
    stem, suffix = split_suffix(path)
    return suffix in FORMATS and not stem.rpartition("/")[2].startswith(LEFTOVERS)


def split_suffix(path: str) -> tuple[str, str]:
    """``a/b.fp16.safetensors`` -> ``a/b.fp16``, ``.safetensors`` (in lower case)."""
    stem, dot, suffix = path.rpartition(".")
    return (stem, f".{suffix.lower()}") if dot and "/" not in suffix else (path, "")


def read_weights(listing: FileListing, path: str, wrapper: str = "") -> WeightFile:
    """Read a file's header. An unreadable file is not an error here but a ``problem`` of the file.

    Args:
        listing: has the file.
        path: of the file.
        wrapper: keys above the tensors of pickles that have several sets of them; those with the most bytes if a pickle
            has no such keys.
    """
    size, expected = listing.files[path], FORMATS[split_suffix(path)[1]]
    if listing.gate:
        return WeightFile(path, size, expected, problem="not read: the repository is gated")
    with listing.open(path) as opened:
        source, reader = _Headed(opened), _READERS.get(expected)
        if source.read_at(0, len(_LFS)) == _LFS:
            return WeightFile(path, size, "lfs pointer", problem="a Git LFS pointer: its content was never fetched")
        if reader is None:
            return WeightFile(path, size, expected, problem=f"tensors of {expected} files are not read")
        try:
            return reader(source, path, wrapper)
        except CheckpointError as error:
            return WeightFile(path, size, expected, problem=_told(error, source, path))


class _Headed:
    """A byte source that caches the first bytes, which usually contain the complete header."""

    def __init__(self, source: ByteSource) -> None:
        self.name, self.size = source.name, source.size
        self._source, self._head = source, source.read_at(0, min(_FIRST_READ, source.size))

    def read_at(self, offset: int, length: int) -> bytes:
        """See :class:`~port_kit.checkpoint.byte_sources.ByteSource`."""
        if min(offset + length, self.size) <= len(self._head):
            return self._head[offset : offset + length]
        return self._source.read_at(offset, length)


def _told(error: CheckpointError, source: ByteSource, path: str) -> str:
    """Return a reader's message without the full file name, which starts the report's line."""
    message = error.message.removeprefix(source.name).lstrip(": ")
    return f"{message.replace(source.name, path.rpartition('/')[2])} [{error.code}]"


def _read_safetensors(source: ByteSource, path: str, _wrapper: str) -> WeightFile:
    start = source.read_at(0, _FIRST_READ)
    length = int.from_bytes(start[:8], "little")
    if len(start) < 8 or not 2 <= length <= min(MAX_HEADER, source.size - 8) or start[8:9] != b"{":
        raise CheckpointError(f"{source.name} has no safetensors header", code="checkpoint_format")
    raw = start[8 : 8 + length] + source.read_at(len(start), max(0, 8 + length - len(start)))
    try:
        header = json.loads(raw)
        metadata = header.pop("__metadata__", {})
        entries = {name: _entry(entry) for name, entry in header.items()}
        places = {name: _place(entry["data_offsets"]) for name, entry in header.items()}
        details = {str(key): str(value) for key, value in metadata.items() if len(str(value)) <= 80}
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError) as error:
        raise CheckpointError(f"{source.name} has a broken header", code="checkpoint_corrupt") from error
    end = max((stop for _, stop in places.values()), default=0)
    wrong = next(_misplaced(entries, places), "")
    if wrong:
        raise CheckpointError(f"{source.name}: {wrong}", code="checkpoint_corrupt")
    if 8 + length + end != source.size:
        message = f"{source.name} has {source.size} bytes, its header needs {8 + length + end}"
        raise CheckpointError(message, code="checkpoint_corrupt")
    return WeightFile(path, source.size, "safetensors", entries, details=details)


def _shape(extents: list[int]) -> tuple[int, ...]:
    if any(type(extent) is not int or extent < 0 for extent in extents):
        raise ValueError(f"{extents} is no shape")
    return tuple(extents)


def _place(offsets: list[int]) -> tuple[int, int]:
    start, stop = offsets
    return int(start), int(stop)


def _misplaced(
    entries: Mapping[str, tuple[tuple[int, ...], str]], places: Mapping[str, tuple[int, int]]
) -> Iterator[str]:
    """Report tensors at wrong offsets: the format stores them one after the other, in the size of their shapes."""
    before = 0
    for name in sorted(places, key=lambda name: places[name]):
        (shape, dtype), (start, stop) = entries[name], places[name]
        size = ITEM_SIZES.get(dtype)
        if start != before:
            yield f"{quoted(name)} begins at byte {start} of the data, the tensor before it ends at {before}"
        if size is not None and stop - start != prod(shape) * size:
            yield f"{quoted(name)} is {dtype} {list(shape)} and has {stop - start} bytes"
        before = stop


def _entry(entry: Mapping[str, Any]) -> tuple[tuple[int, ...], str]:
    """Return shape and dtype in torch's terms; those of a dtype that the table lacks as the header has them."""
    shape, dtype = _shape(entry["shape"]), BY_WORD.get(entry["dtype"])
    return (shape, entry["dtype"].lower()) if dtype is None else (torch_shape(dtype, shape), dtype.name)


def _read_torch(source: ByteSource, path: str, wrapper: str) -> WeightFile:
    """Read the tables under the wrapper if there is one, else those with the most bytes."""
    parsed = parse_pickle(source, exact_offsets=False)
    places = {place.path or ".": place.nbytes for place in parsed.places if place.named}
    chosen = wrapper if wrapper in places else max(places, key=lambda key: places[key], default="")
    tables = parsed.tables(chosen)
    entries = {name: (tuple(entry.shape), entry.dtype) for name, entry in tables.tensors.items()}
    return WeightFile(
        path,
        source.size,
        f"torch {tables.container}",
        entries,
        wrapper="" if list(places) == ["."] else chosen,
        details=dict(tables.others),
        alternatives=tuple(key for key in places if key != chosen and 2 * places[key] >= places[chosen]),
    )


def _read_gguf(source: ByteSource, path: str, _wrapper: str) -> WeightFile:
    header = read_gguf(source)
    kept = {key: value for key, value in header.metadata.items() if key.startswith("general.") and len(value) <= 80}
    return WeightFile(path, source.size, "gguf", header.entries, details=kept)


_READERS: dict[str, Callable[[ByteSource, str, str], WeightFile]] = {
    "safetensors": _read_safetensors,
    "torch": _read_torch,
    "gguf": _read_gguf,
}
