"""The tensors of a torch checkpoint and their places in the file, without torch and without executing anything.

:func:`read_tables` reads the zip container (torch 1.6 and later) and the legacy one, local or remote, from its
directory and its pickle alone: no tensor's bytes are touched. ``tables.tensors[name]`` is ``(shape, dtype, storage,
offset, strides)``; ``tables.storages[key]`` says at which byte of the file a storage begins, so that its bytes can be
copied by offset.
"""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from zlib import crc32

from port_kit.checkpoint.byte_sources import ByteSource, FileSource, SourceFile, StreamSource
from port_kit.checkpoint.containers import describe_zip, looks_like_safetensors, looks_like_torch, refuse_foreign
from port_kit.checkpoint.dtypes import ITEM_SIZES
from port_kit.checkpoint.pickle_values import StorageRef, TensorRef, values_below
from port_kit.checkpoint.state_dicts import Place, count_elsewhere, flatten, refuse_unselected, unwrap
from port_kit.checkpoint.unpickler import LONGEST_PICKLE, read_pickle
from port_kit.errors import CheckpointError

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_LOCAL_HEADER = struct.Struct("<4s22xHH")
_HUGE = 0xFFFFFFFF


class TensorEntry(NamedTuple):
    """A tensor: a view of a storage. ``offset`` and ``strides`` count elements of ``dtype``."""

    shape: tuple[int, ...]
    dtype: str
    storage: str
    offset: int
    strides: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor when it is laid out contiguously."""
        return prod(self.shape) * ITEM_SIZES[self.dtype]

    @property
    def is_contiguous(self) -> bool:
        """Return True if its elements lie one after another in row order in its storage."""
        expected = 1
        for length, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if length != 1 and stride != expected:
                return prod(self.shape) == 0
            expected *= length
        return True


class Storage(NamedTuple):
    """The place of a storage's bytes in the file; ``crc`` is the zip directory's CRC-32, None in legacy files."""

    offset: int
    nbytes: int
    crc: int | None
    header_offset: int = -1
    name: str = ""


@dataclass(frozen=True)
class Tables:
    """The content of a checkpoint.

    Attributes:
        tensors: by name, in the file's order.
        storages: by the key that tensors name.
        others: values beside the tensors that are not tensors, ``{name: kind}``.
        container: ``zip`` or ``legacy``.
        size: of the file, bytes.
        elsewhere: where further tensors lie, those of most names first.
    """

    tensors: Mapping[str, TensorEntry]
    storages: Mapping[str, Storage]
    others: Mapping[str, str]
    container: str
    size: int
    elsewhere: tuple[Place, ...] = ()


def read_tables(
    source: str | Path | BinaryIO | ByteSource,
    wrapper: str = "",
    *,
    drop: Sequence[str] = (),
    exact_offsets: bool = True,
) -> Tables:
    """Read what a ``.pth``, ``.pt`` or ``.bin`` file holds.

    Args:
        source: a path, an open binary file, or anything with ``name``, ``size`` and ``read_at``.
        wrapper: the keys above the tensors, dotted (``generator``, ``app.model``); empty, or ``.``, for a bare state
            dict.
        drop: names beside or among the tensors that are left out on purpose; nothing of them is built.
        exact_offsets: read each storage's local header. Without it the offsets follow from torch's alignment
            rule, which saves a request a tensor on a remote file; check them with :func:`check_offsets`.

    Raises:
        CheckpointError: ``checkpoint_format`` for what is no torch file, ``pickle_unsafe`` for a pickle that asks for
            more than tensors in what is kept, ``pickle_unsupported`` and ``pickle_corrupt``, ``pickle_wrapper`` if all
            tensors lie under other keys, ``pickle_drop`` for a name that is not there.
    """
    with _open(source) as opened:
        _check_first_bytes(opened)
        stream = SourceFile(opened)
        if opened.read_at(0, 4) == b"PK\x03\x04":
            container, root, storages = "zip", *_read_zip(stream, opened, exact_offsets)
        else:
            container, root, storages = "legacy", *_read_legacy(stream, opened, exact_offsets)
        selected = unwrap(root, wrapper, opened.name)
        tensors, others = flatten(selected, drop, opened.name)
        elsewhere = count_elsewhere(root, selected)
        if not tensors:
            refuse_unselected(elsewhere, opened.name)
        return Tables(_entries(tensors, storages, opened.name), storages, others, container, opened.size, elsewhere)


def check_offsets(source: ByteSource, storages: Mapping[str, Storage]) -> list[str]:
    """Return the keys of zip storages whose local header says another offset than assumed."""
    return [
        key
        for key, storage in storages.items()
        if storage.header_offset >= 0 and _local_offset(source, storage.header_offset) != storage.offset
    ]


def _open(source: str | Path | BinaryIO | ByteSource) -> AbstractContextManager[ByteSource]:
    if isinstance(source, (str, Path)):
        return FileSource(source)
    return nullcontext(source if isinstance(source, ByteSource) else StreamSource(source))


def _check_first_bytes(source: ByteSource) -> None:
    """Name what is often saved as a ``.pth`` and is none: error pages, LFS pointers, archives of other kinds."""
    refuse_foreign(source)
    found = ""
    if not source.size:
        found = "is empty"
    elif looks_like_safetensors(source):
        found = "is a safetensors file already"
    elif not looks_like_torch(source):
        found = f"begins with {source.read_at(0, 8)!r}"
    if found:
        raise CheckpointError(
            f"{source.name} {found}; a torch checkpoint (zip or legacy pickle container) is required",
            code="checkpoint_format",
            hint="fetch the file again, or convert it with the program that wrote it",
        )


def _read_zip(stream: SourceFile, source: ByteSource, exact_offsets: bool) -> tuple[Any, dict[str, Storage]]:
    try:
        with zipfile.ZipFile(stream) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, struct.error, ValueError, NotImplementedError, EOFError, OSError) as error:
        raise CheckpointError(
            f"{source.name}: the zip directory cannot be read ({error})",
            code="pickle_corrupt",
            hint="the file is cut short or damaged: fetch it again",
        ) from error
    by_name = _unique_names(entries, source.name)
    prefix = _prefix(by_name, source.name)
    _check_members(by_name, prefix, source)
    data = _member(source, by_name[f"{prefix}/data.pkl"])
    root = _read_whole_pickle(data, f"{source.name}:{prefix}/data.pkl")
    return root, _zip_storages(by_name, f"{prefix}/data/", source, exact_offsets)


def _unique_names(entries: list[zipfile.ZipInfo], name: str) -> dict[str, zipfile.ZipInfo]:
    by_name = {entry.orig_filename: entry for entry in entries}
    if len(by_name) != len(entries):
        raise CheckpointError(f"{name}: two zip entries have one name", code="pickle_unsafe")
    for entry in entries:
        if entry.header_offset < 0:
            raise CheckpointError(
                f"{name}: zip entry {entry.orig_filename!r} begins before the file", code="pickle_corrupt"
            )
    return by_name


def _prefix(by_name: Mapping[str, zipfile.ZipInfo], name: str) -> str:
    found = [entry.rpartition("/")[0] for entry in by_name if entry.rpartition("/")[2] == "data.pkl"]
    if not found:
        container = describe_zip(by_name)
        raise CheckpointError(f"{name} {container.what}", code="checkpoint_format", hint=container.hint)
    if len(found) > 1:
        raise CheckpointError(
            f"{name} holds {len(found)} data.pkl entries; a torch checkpoint holds one", code="pickle_unsafe"
        )
    return found[0]


def _check_members(by_name: Mapping[str, zipfile.ZipInfo], prefix: str, source: ByteSource) -> None:
    others = [name for name in by_name if not name.startswith(f"{prefix}/")]
    if others:
        raise CheckpointError(f"{source.name}: zip entry {others[0]!r} lies outside {prefix}/", code="pickle_unsafe")
    if f"{prefix}/constants.pkl" in by_name or any(name.startswith(f"{prefix}/code/") for name in by_name):
        raise CheckpointError(
            f"{source.name} is a TorchScript archive: it holds code, not only tensors",
            code="pickle_unsupported",
            hint="load it where you trust it and save its state_dict()",
        )
    for entry in by_name.values():
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
            raise CheckpointError(
                f"{source.name}: zip entry {entry.orig_filename!r} is compressed or encrypted; torch stores plainly",
                code="pickle_unsupported",
                hint="unpack the archive and save the checkpoint again with torch.save",
            )
    order = by_name.get(f"{prefix}/byteorder")
    if order is not None and _member(source, order).strip() != b"little":
        raise CheckpointError(
            f"{source.name} was written on a big-endian machine",
            code="pickle_unsupported",
            hint="load it with torch and save it on a little-endian machine",
        )


def _member(source: ByteSource, entry: zipfile.ZipInfo) -> bytes:
    """Read one small entry and check its CRC-32."""
    if entry.file_size > LONGEST_PICKLE:
        raise CheckpointError(
            f"{source.name}: zip entry {entry.filename!r} has {entry.file_size} bytes", code="pickle_corrupt"
        )
    data = source.read_at(_local_offset(source, entry.header_offset), entry.file_size)
    if len(data) != entry.file_size or (entry.CRC and crc32(data) != entry.CRC):
        raise CheckpointError(f"{source.name}: zip entry {entry.filename!r} fails its CRC-32", code="pickle_corrupt")
    return data


def _local_offset(source: ByteSource, header_offset: int) -> int:
    """Return where an entry's bytes begin: behind its local header, whose extra field differs from the directory's."""
    header = source.read_at(header_offset, _LOCAL_HEADER.size)
    if len(header) != _LOCAL_HEADER.size or not header.startswith(b"PK\x03\x04"):
        raise CheckpointError(f"{source.name}: no zip entry at byte {header_offset}", code="pickle_corrupt")
    _, name_length, extra_length = _LOCAL_HEADER.unpack(header)
    return header_offset + _LOCAL_HEADER.size + name_length + extra_length


def _aligned_offset(entry: zipfile.ZipInfo, alignment: int) -> int:
    """The same by torch's rule: the extra field pads so that every entry begins at a multiple of ``alignment``."""
    start = entry.header_offset + _LOCAL_HEADER.size + len(entry.orig_filename.encode()) + 4
    if entry.file_size >= _HUGE or entry.header_offset >= _HUGE:
        start += 4 + 16 * (entry.file_size >= _HUGE) + 8 * (entry.header_offset >= _HUGE)
    return -(-start // alignment) * alignment


def _zip_storages(
    by_name: Mapping[str, zipfile.ZipInfo], folder: str, source: ByteSource, exact_offsets: bool
) -> dict[str, Storage]:
    storages = {}
    alignment = _alignment(by_name.get(f"{folder.removesuffix('data/')}.storage_alignment"), source)
    has_crc = _has_crc(by_name)
    for name, entry in by_name.items():
        if name.startswith(folder):
            exact = exact_offsets or not alignment
            offset = _local_offset(source, entry.header_offset) if exact else _aligned_offset(entry, alignment)
            crc = entry.CRC if has_crc else None
            key = name.removeprefix(folder)
            storages[key] = Storage(offset, entry.file_size, crc, entry.header_offset, name)
            if offset + entry.file_size > source.size:
                raise CheckpointError(f"{source.name}: zip entry {name!r} ends behind the file", code="pickle_corrupt")
    if exact_offsets:
        _check_overlaps(storages, source.name)
    return storages


def _alignment(entry: zipfile.ZipInfo | None, source: ByteSource) -> int:
    """Return the multiple of bytes at which storages begin, as torch notes it; 0 if the note cannot be read."""
    text = b"64" if entry is None else _member(source, entry) if entry.file_size < 20 else b""
    return int(text) if text.isdigit() and 0 < int(text) <= 1 << 16 else 0


def _has_crc(by_name: Mapping[str, zipfile.ZipInfo]) -> bool:
    """Return False if torch wrote the file without CRC-32: all entries have 0 then."""
    return any(entry.CRC for entry in by_name.values() if entry.file_size)


def _check_overlaps(storages: Mapping[str, Storage], name: str) -> None:
    """Each byte of the file belongs to one storage at most; what is written while it arrives rests on that."""
    end = 0
    for storage in sorted(storages.values(), key=lambda item: item.offset):
        if storage.offset < end and storage.nbytes:
            raise CheckpointError(f"{name}: zip entry {storage.name!r} lies inside another one", code="pickle_corrupt")
        end = max(end, storage.offset + storage.nbytes)


def _read_whole_pickle(data: bytes, where: str) -> Any:
    stream = io.BytesIO(data)
    value = read_pickle(stream, where, allow_opaque=True)
    if stream.tell() != len(data):
        raise CheckpointError(
            f"{where}: {len(data) - stream.tell()} bytes lie behind the pickle's end", code="pickle_unsafe"
        )
    return value


def _read_legacy(stream: SourceFile, source: ByteSource, exact_offsets: bool) -> tuple[Any, dict[str, Storage]]:
    """Five pickles (magic, protocol, system, object, storage keys), then each storage with its length before it."""
    header = [read_pickle(stream, source.name) for _ in range(3)]  # type: ignore[arg-type]
    if header[:2] != [_LEGACY_MAGIC, _LEGACY_PROTOCOL]:
        raise CheckpointError(
            f"{source.name} is a plain pickle, not a torch checkpoint",
            code="checkpoint_format",
            hint="save the tensors with torch.save",
        )
    if not isinstance(header[2], dict) or header[2].get("little_endian") is not True:
        raise CheckpointError(f"{source.name} was written on a big-endian machine", code="pickle_unsupported")
    root = read_pickle(stream, source.name, allow_opaque=True)  # type: ignore[arg-type]
    keys = read_pickle(stream, source.name)  # type: ignore[arg-type]
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise CheckpointError(f"{source.name}: the list of storages is not one", code="pickle_corrupt")
    refs = {ref.key: ref for ref in _storage_refs(root, source.name)}
    storages = _legacy_storages(keys, refs, stream.tell(), source)
    if exact_offsets:
        _check_counts(stream, storages, refs, source.name)
    return root, storages


def _legacy_storages(
    keys: list[str], refs: Mapping[str, StorageRef], offset: int, source: ByteSource
) -> dict[str, Storage]:
    storages = {}
    for key in keys:
        if key not in refs:
            raise CheckpointError(f"{source.name}: storage {key} belongs to no tensor", code="pickle_unsupported")
        if key in storages:
            raise CheckpointError(f"{source.name}: storage {key} is listed twice", code="pickle_corrupt")
        size = refs[key].numel * ITEM_SIZES[refs[key].dtype or "uint8"]
        storages[key] = Storage(offset + 8, size, None)
        offset += 8 + size
    if offset > source.size:
        raise CheckpointError(
            f"{source.name} has {source.size} bytes, its storages need {offset}",
            code="pickle_corrupt",
            hint="the file is cut short: fetch it again",
        )
    return storages


def _check_counts(
    stream: SourceFile, storages: Mapping[str, Storage], refs: Mapping[str, StorageRef], name: str
) -> None:
    """Before each storage its number of elements is written once more: the only thing that tells damage here."""
    for key, storage in storages.items():
        stream.seek(storage.offset - 8)
        count = int.from_bytes(stream.read(8), "little")
        if count != refs[key].numel:
            raise CheckpointError(
                f"{name}: storage {key} begins with the length {count}, its tensors say {refs[key].numel}",
                code="pickle_corrupt",
                hint="the file is damaged: fetch it again",
            )


def _storage_refs(root: Any, name: str) -> Iterator[StorageRef]:
    """Yield all storages of a pickle, also of what is left out: their bytes lie in between."""
    for value in values_below(root):
        if isinstance(value, TensorRef):
            yield value.storage
        elif isinstance(value, StorageRef):
            yield value


def _entries(tensors: Mapping[str, TensorRef], storages: Mapping[str, Storage], name: str) -> dict[str, TensorEntry]:
    entries = {}
    for key, tensor in tensors.items():
        if tensor.dtype not in ITEM_SIZES:
            raise CheckpointError(
                f"{name}: tensor {key} has the dtype {tensor.dtype}, which is not read",
                code="pickle_unsupported",
                hint=f"save it with another dtype; dtypes: {', '.join(ITEM_SIZES)}",
            )
        storage = storages.get(tensor.storage.key)
        if storage is None:
            raise CheckpointError(
                f"{name}: tensor {key} names storage {tensor.storage.key}, which the file lacks", code="pickle_corrupt"
            )
        declared = tensor.storage.numel * ITEM_SIZES[tensor.storage.dtype or "uint8"]
        last = tensor.offset + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.strides, strict=True))
        reach = (last + 1) * ITEM_SIZES[tensor.dtype] if prod(tensor.shape) else 0
        if declared != storage.nbytes or reach > storage.nbytes:
            raise CheckpointError(
                f"{name}: tensor {key} of shape {tensor.shape} needs {max(reach, declared)} bytes of storage "
                f"{tensor.storage.key}, which has {storage.nbytes}",
                code="pickle_corrupt",
            )
        entries[key] = TensorEntry(tensor.shape, tensor.dtype, tensor.storage.key, tensor.offset, tensor.strides)
    return entries
