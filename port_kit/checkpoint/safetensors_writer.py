"""Layout of the safetensors file made from a torch checkpoint: its header and the offset of every tensor.

Tensors keep their names. They are ordered by falling element size, so that all are aligned, then as in the checkpoint.
A tensor that is a contiguous piece of a storage goes straight to its place (*direct*). Strided views, and tensors whose
bytes another name already has (tied weights), are *gathered* afterwards: every name gets bytes of its own, as loaders
expect.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from port_kit.checkpoint.byte_layout import ByteLayout, ByteRange, write_all
from port_kit.checkpoint.byte_sources import ByteSource, FileSource
from port_kit.checkpoint.containers import MAX_HEADER
from port_kit.checkpoint.pickle_reader import Storage, Tables, crc32
from port_kit.checkpoint.pickle_values import TensorEntry, corrupt, unsupported
from port_kit.dtypes import DTYPES, ITEM_SIZES, header_shape
from port_kit.errors import CheckpointError
from port_kit.escape import quoted, reason_of
from port_kit.manifest import NAMING_KEY

_ITEM_FORMATS: dict[int, Literal["B", "H", "I", "Q"]] = {1: "B", 2: "H", 4: "I", 8: "Q"}
_BATCH = 1 << 20
_SCALARS = frozenset(("int", "float", "bool", "str", "NoneType"))
_MOST_GROWTH = 64
_ALWAYS_ALLOWED = 1 << 28


class TensorPlacement(NamedTuple):
    """A tensor and the byte of the written file at which it begins."""

    name: str
    entry: TensorEntry
    target: int
    direct: bool


@dataclass(frozen=True)
class SafetensorsLayout:
    """Layout of a file. ``header`` is everything before the first tensor, ``size`` the size of the file in bytes."""

    header: bytes
    placements: tuple[TensorPlacement, ...]
    size: int
    tables: Tables

    @property
    def used_storages(self) -> dict[str, Storage]:
        """The storages that any tensor views, in the order of the source file."""
        keys = {placement.entry.storage for placement in self.placements}
        used = [(key, storage) for key, storage in self.tables.storages.items() if key in keys]
        return dict(sorted(used, key=lambda item: item[1].offset))

    def byte_layout(self) -> ByteLayout:
        """Map the source's bytes to the file: direct tensors to their offsets, all other bytes behind the end."""
        ranges, position, behind = [], 0, self.size
        direct = [placement for placement in self.placements if placement.direct and placement.entry.nbytes]
        for start, placement in sorted((_source_offset(item.entry, self.tables), item) for item in direct):
            length, target = placement.entry.nbytes, placement.target
            ranges.append(ByteRange(position, start - position, behind))
            behind += start - position
            ranges.append(ByteRange(start, length, target))
            position = start + length
        ranges.append(ByteRange(position, self.tables.size - position, behind))
        return ByteLayout(ranges, self.tables.size)

    def _batches(self, placements: Iterable[TensorPlacement], source: ByteSource) -> Iterator[tuple[int, bytes]]:
        """Yield ``(offset in the written file, bytes)`` of tensors."""
        for placement in placements:
            target = placement.target
            for batch in _gathered(placement.entry, self.tables, source):
                yield target, batch
                target += len(batch)

    def is_content_of(self, path: Path, source: ByteSource) -> bool:
        """Return True if the file at ``path`` has exactly this content: the header and every tensor."""
        try:
            with FileSource(path) as found:
                if found.size != self.size or found.read_at(0, len(self.header)) != self.header:
                    return False
                batches = self._batches(self.placements, source)
                return all(found.read_at(target, len(batch)) == batch for target, batch in batches)
        except OSError:
            return False

    def complete(self, source: ByteSource, descriptor: int) -> None:
        """Write the parts outside of the byte layout: the header and the gathered tensors, read from ``source``."""
        write_all(descriptor, memoryview(self.header), 0)
        gathered = (placement for placement in self.placements if not placement.direct)
        for target, batch in self._batches(gathered, source):
            write_all(descriptor, memoryview(batch), target)


def scalars(tables: Tables) -> dict[str, str]:
    """Return the values beside the tensors that are numbers, texts or None, ``{name: kind}``."""
    return {key: kind for key, kind in tables.others.items() if kind in _SCALARS}


def plan_layout(tables: Tables, name: str, *, leave_out_scalars: bool = False) -> SafetensorsLayout:
    """Lay out the safetensors file for a checkpoint.

    Args:
        tables: the tables of the checkpoint.
        name: name for messages.
        leave_out_scalars: numbers, texts and None beside the tensors (``epoch``) are no error.

    Raises:
        CheckpointError: ``pickle_unsupported`` for values or dtypes that safetensors cannot hold.
    """
    _check_content(tables, name, leave_out_scalars)
    kept = sorted(tables.tensors.items(), key=lambda item: -ITEM_SIZES[item[1].dtype])
    header: dict[str, object] = {"__metadata__": {"format": "pt", NAMING_KEY: "original"}}
    position = 0
    for key, entry in kept:
        header[key] = _header_entry(entry, key, name, position)
        position += entry.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER:
        raise unsupported(
            f"{name}: the names of its {len(kept)} tensors need a header of {len(text)} bytes, safetensors allows "
            f"{MAX_HEADER}"
        )
    direct, position, placements = _direct_names(kept), 8 + len(text), []
    for key, entry in kept:
        placements.append(TensorPlacement(key, entry, position, key in direct))
        position += entry.nbytes
    return SafetensorsLayout(len(text).to_bytes(8, "little") + text, tuple(placements), position, tables)


def check_crcs(layout: SafetensorsLayout, name: str, read: Callable[[memoryview, int], None]) -> None:
    """Compare the used storages with the zip directory's CRC-32; ``read(buffer, offset)`` fills a buffer.

    Raises:
        CheckpointError: ``pickle_corrupt`` with the entry's name.
    """
    buffer = memoryview(bytearray(_BATCH))
    for key, storage in layout.used_storages.items():
        if storage.crc is None:
            continue
        value = 0
        for offset in range(0, storage.nbytes, _BATCH):
            view = buffer[: min(_BATCH, storage.nbytes - offset)]
            read(view, storage.offset + offset)
            value = crc32(view, value)
        require_crc(storage, key, value, name)


def require_crc(storage: Storage, key: str, value: int, name: str) -> None:
    """Raise unless ``value`` is the CRC-32 that the zip directory states for a storage."""
    if storage.crc is not None and value != storage.crc:
        raise corrupt(f"{name}: storage {key} has CRC-32 {value:08x}, the zip directory says {storage.crc:08x}")


def _check_content(tables: Tables, name: str, leave_out_scalars: bool) -> None:
    others = {key: kind for key, kind in tables.others.items() if not (leave_out_scalars and kind in _SCALARS)}
    if others:
        listed = ", ".join(f"{key} ({kind})" for key, kind in list(others.items())[:8])
        raise CheckpointError(
            f"{name} holds values beside its tensors: {listed}",
            code="pickle_unsupported",
            hint="name the key above the tensors (--wrapper), or leave these out (--drop NAME); recipes have both too",
            others=others,
        )
    if not tables.tensors:
        raise unsupported(f"{name} holds no tensors")
    # Tied and expanded tensors get bytes of their own; a few bytes that claim to be terabytes do not.
    size = sum(entry.nbytes for entry in tables.tensors.values())
    if size > max(_MOST_GROWTH * tables.size, _ALWAYS_ALLOWED):
        raise unsupported(
            f"{name} has {tables.size} bytes, and its tensors would be {size} bytes without shared storage",
            "expanded tensors are saved once for each element: leave them out (--drop NAME; in a recipe: drop)",
        )


def _header_entry(entry: TensorEntry, key: str, name: str, position: int) -> dict[str, object]:
    if key == "__metadata__" or any("\ud800" <= character <= "\udfff" for character in key):
        shown = quoted(key)
        raise unsupported(f"{name}: safetensors cannot hold a tensor of the name {shown}", "rename the tensor")
    dtype = DTYPES[entry.dtype]
    try:
        shape = header_shape(dtype, entry.shape)
    except ValueError as error:
        raise unsupported(f"{name}: tensor {key}: {reason_of(error)}", "save it with another shape") from error
    if not dtype.word:
        raise unsupported(
            f"{name}: tensor {key} is {entry.dtype}, which safetensors cannot hold", "save it with another dtype"
        )
    return {"dtype": dtype.word, "shape": shape, "data_offsets": [position, position + entry.nbytes]}


def _direct_names(tensors: Sequence[tuple[str, TensorEntry]]) -> set[str]:
    """Contiguous tensors whose bytes no other direct tensor has claimed, by storage in the order of their bytes."""
    claims = [
        (entry.storage, entry.offset * ITEM_SIZES[entry.dtype], entry.nbytes, key)
        for key, entry in tensors
        if entry.is_contiguous
    ]
    direct, storage, end = set(), "", 0
    for key_of_storage, start, length, key in sorted(claims, key=lambda claim: claim[:2]):
        if key_of_storage != storage:
            storage, end = key_of_storage, 0
        if start >= end or not length:
            direct.add(key)
            end = max(end, start + length)
    return direct


def _source_offset(entry: TensorEntry, tables: Tables) -> int:
    return tables.storages[entry.storage].offset + entry.offset * ITEM_SIZES[entry.dtype]


def _gathered(entry: TensorEntry, tables: Tables, source: ByteSource) -> Iterator[bytes]:
    """Yield a tensor's bytes in row order, in batches; only the storage's part that it views is held in memory."""
    if entry.nbytes == 0:
        return
    item = ITEM_SIZES[entry.dtype]
    start = _source_offset(entry, tables)
    if entry.is_contiguous:
        for offset in range(0, entry.nbytes, _BATCH):
            yield source.read_at(start + offset, min(_BATCH, entry.nbytes - offset))
        return
    reach = 1 + sum((length - 1) * stride for length, stride in zip(entry.shape, entry.strides, strict=True))
    items = memoryview(source.read_at(start, reach * item)).cast(_ITEM_FORMATS[item])
    batch = bytearray()
    axes = [axis for axis in zip(entry.shape, entry.strides, strict=True) if axis[0] != 1]
    for row in _rows(items, axes):
        batch += row
        if len(batch) >= _BATCH:
            yield bytes(batch)
            batch.clear()
    yield bytes(batch)


def _rows(items: memoryview, axes: Sequence[tuple[int, int]]) -> Iterator[bytes]:
    """Yield a strided view in row order, a batch at most each time; ``axes`` are (length, stride), the last one inner.

    The memory view itself cuts out the innermost axis.
    """
    (length, stride), inner = axes[0], axes[1:]
    if inner:
        for index in range(length):
            yield from _rows(items[index * stride :], inner)
        return
    most = _BATCH // items.itemsize
    for done in range(0, length, most):
        count, begin = min(most, length - done), done * stride
        if stride == 0:
            yield items[:1].tobytes() * count
        else:
            yield items[begin : begin + (count - 1) * stride + 1 : stride].tobytes()
