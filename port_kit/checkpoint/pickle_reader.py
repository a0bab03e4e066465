"""The tensors of a torch checkpoint and their places in the file, without torch and without executing anything.

:func:`read_tables` reads the zip container (torch 1.6 and later) and the legacy one, local or remote, from its
directory and its pickle alone: no tensor's bytes are touched. ``tables.tensors[name]`` is a view of
``tables.storages[tensor.storage]``, which says at which byte of the file the storage begins.
"""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from port_kit.checkpoint.byte_sources import ByteSource, CachedSource, FileSource, StreamSource
from port_kit.checkpoint.containers import describe_zip, looks_like_safetensors, looks_like_torch, refuse_foreign
from port_kit.checkpoint.pickle_values import StorageRef, TensorEntry, TensorRef, corrupt, unsupported, values_below
from port_kit.checkpoint.state_dicts import (
    Place,
    count_elsewhere,
    flatten,
    refuse_unselected,
    require_droppable,
    unwrap,
)
from port_kit.checkpoint.unpickler import LONGEST_PICKLE, read_pickle
from port_kit.dtypes import ITEM_SIZES
from port_kit.errors import CheckpointError
from port_kit.escape import quoted, reason_of

try:
    from isal.isal_zlib import crc32
except ImportError:  # setup.cfg requires isal on supported machines; zlib is ten times slower
    from zlib import crc32

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_LOCAL_HEADER = struct.Struct("<4s22xHH")
_HUGE = 0xFFFFFFFF


class Storage(NamedTuple):
    """The place of a storage's bytes in the file; ``crc`` is the zip directory's CRC-32, None in legacy files."""

    offset: int
    nbytes: int
    crc: int | None
    header_offset: int = -1


@dataclass(frozen=True)
class Tables:
    """The content of a checkpoint.

    Attributes:
        tensors: by name, in the file's order.
        storages: by the key that tensors name.
        others: values beside the tensors that are not tensors, ``{name: kind}``.
        container: ``zip`` or ``legacy``.
        size: of the file, bytes.
        elsewhere: paths of further tensors in the pickle, those with the most names first.
    """

    tensors: Mapping[str, TensorEntry]
    storages: Mapping[str, Storage]
    others: Mapping[str, str]
    container: str
    size: int
    elsewhere: tuple[Place, ...] = ()


@dataclass(frozen=True)
class ParsedPickle:
    """A checkpoint whose pickle was read, and of which no tensors are selected yet.

    Attributes:
        root: value of the pickle, with records in place of tensors.
        storages: by the key that tensors name.
        container: ``zip`` or ``legacy``.
        name: of the file, for messages.
        size: of the file, bytes.
    """

    root: Any
    storages: Mapping[str, Storage]
    container: str
    name: str
    size: int

    @property
    def places(self) -> tuple[Place, ...]:
        """The paths of all tensors, those with the most names first."""
        return count_elsewhere(self.root)

    def tables(self, wrapper: str = "", drop: Sequence[str] = ()) -> Tables:
        """Select the tensors under a wrapper; see :func:`read_tables`. Values outside of it are not judged."""
        path = unwrap(self.root, wrapper, self.name)
        elsewhere = count_elsewhere(self.root, path[-1])
        if not any(isinstance(key, str) and isinstance(value, TensorRef) for key, value in path[-1].items()):
            refuse_unselected(elsewhere, self.name)
        require_droppable(path, wrapper, drop, self.name)
        tensors, others = flatten(path[-1], drop, self.name)
        entries = _entries(tensors, self.storages, self.name)
        return Tables(entries, self.storages, others, self.container, self.size, elsewhere)


def read_tables(
    source: str | Path | BinaryIO | ByteSource,
    wrapper: str = "",
    *,
    drop: Sequence[str] = (),
    exact_offsets: bool = True,
) -> Tables:
    """Read the tables of a ``.pth``, ``.pt`` or ``.bin`` file.

    Args:
        source: a path, an open binary file, or anything with ``name``, ``size`` and ``read_at``.
        wrapper: the keys above the tensors, dotted (``generator``, ``app.model``); empty, or ``.``, for a bare state
            dict.
        drop: names among the selected tensors, or beside the wrapper, that are left out on purpose; they are not built.
        exact_offsets: read each storage's local header. Without it the offsets follow from torch's alignment
            rule, which saves a request a tensor on a remote file; check them with :func:`check_offsets`.

    Raises:
        CheckpointError: ``checkpoint_format`` for other files, ``pickle_unsafe`` for a pickle that asks for
            more than tensors in the kept part, ``pickle_unsupported`` and ``pickle_corrupt``, ``pickle_wrapper`` if all
            tensors lie under other keys, ``pickle_drop`` for a name that is not there.
    """
    return parse_pickle(source, exact_offsets=exact_offsets).tables(wrapper, drop)


def parse_pickle(source: str | Path | BinaryIO | ByteSource, *, exact_offsets: bool = True) -> ParsedPickle:
    """Read the pickle of a file; see :func:`read_tables`."""
    with _open(source) as opened:
        _check_first_bytes(opened)
        stream = CachedSource(opened)
        if opened.read_at(0, 4) == b"PK\x03\x04":
            container, root, storages = "zip", *_read_zip(stream, opened, exact_offsets)
        else:
            container, root, storages = "legacy", *_read_legacy(stream, opened, exact_offsets)
        return ParsedPickle(root, storages, container, opened.name, opened.size)


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
    """Detect files that are often named ``.pth`` by mistake: error pages, LFS pointers, other archives."""
    refuse_foreign(source)
    found = ""
    if not source.size:
        found = "is empty"
    elif looks_like_safetensors(source):
        found = "is a safetensors file already"
    elif not looks_like_torch(source):
        found = f"begins with {quoted(source.read_at(0, 8))}"
    if found:
        raise CheckpointError(
            f"{source.name} {found}; a torch checkpoint (zip or legacy pickle container) is required",
            code="checkpoint_format",
            hint="fetch the file again, or convert it with the program that wrote it",
        )


def _read_zip(stream: CachedSource, source: ByteSource, exact_offsets: bool) -> tuple[Any, dict[str, Storage]]:
    try:
        with zipfile.ZipFile(stream) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, struct.error, ValueError, NotImplementedError, EOFError, OSError) as error:
        raise corrupt(f"{source.name}: the zip directory cannot be read ({reason_of(error)})") from error
    by_name = {entry.orig_filename: entry for entry in entries}
    if len(by_name) != len(entries):
        raise CheckpointError(f"{source.name}: two zip entries have one name", code="pickle_unsafe")
    for name, entry in by_name.items():
        if entry.header_offset < 0:
            raise corrupt(f"{source.name}: zip entry {quoted(name)} begins before the file")
    folder = _check_members(by_name, source)
    data, where = _member(source, by_name[f"{folder}data.pkl"]), f"{source.name}:{folder}data.pkl"
    pickled = io.BytesIO(data)
    root = read_pickle(pickled, where, allow_opaque=True)
    if pickled.tell() != len(data):
        raise CheckpointError(
            f"{where}: {len(data) - pickled.tell()} bytes lie behind the pickle's end", code="pickle_unsafe"
        )
    return root, _zip_storages(by_name, folder, source, exact_offsets)


def _check_members(by_name: Mapping[str, zipfile.ZipInfo], source: ByteSource) -> str:
    """Refuse archives that torch.save does not write; return the folder of all entries, with the slash."""
    found = [name for name in by_name if name.rpartition("/")[2] == "data.pkl"]
    if not found:
        container = describe_zip(by_name)
        raise CheckpointError(f"{source.name} {container.what}", code="checkpoint_format", hint=container.hint)
    if len(found) > 1:
        raise CheckpointError(
            f"{source.name} holds {len(found)} data.pkl entries; a torch checkpoint holds one", code="pickle_unsafe"
        )
    folder = found[0].rpartition("/")[0] + "/"
    for name in by_name:
        if not name.startswith(folder):
            raise CheckpointError(
                f"{source.name}: zip entry {quoted(name)} lies outside {folder}", code="pickle_unsafe"
            )
        if name == f"{folder}constants.pkl" or name.startswith(f"{folder}code/"):
            raise unsupported(
                f"{source.name} is a TorchScript archive: it holds code, not only tensors",
                "load it where you trust it and save its state_dict()",
            )
    for name, entry in by_name.items():
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
            raise unsupported(
                f"{source.name}: zip entry {quoted(name)} is compressed or encrypted; torch stores plainly",
                "unpack the archive and save the checkpoint again with torch.save",
            )
    order = by_name.get(f"{folder}byteorder")
    if order is not None and _member(source, order).strip() != b"little":
        raise unsupported(
            f"{source.name} was written on a big-endian machine",
            "load it with torch and save it on a little-endian machine",
        )
    return folder


def _member(source: ByteSource, entry: zipfile.ZipInfo) -> bytes:
    """Read one small entry and check its CRC-32."""
    if entry.file_size > LONGEST_PICKLE:
        raise corrupt(f"{source.name}: zip entry {quoted(entry.filename)} has {entry.file_size} bytes")
    data = source.read_at(_local_offset(source, entry.header_offset), entry.file_size)
    if len(data) != entry.file_size or (entry.CRC and crc32(data) != entry.CRC):
        raise corrupt(f"{source.name}: zip entry {quoted(entry.filename)} fails its CRC-32")
    return data


def _local_offset(source: ByteSource, header_offset: int) -> int:
    """Return the offset of an entry's bytes, behind its local header, whose extra field may differ."""
    header = source.read_at(header_offset, _LOCAL_HEADER.size)
    if len(header) != _LOCAL_HEADER.size or not header.startswith(b"PK\x03\x04"):
        raise corrupt(f"{source.name}: no zip entry at byte {header_offset}")
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
    storages, end = {}, 0
    alignment = _alignment(by_name.get(f"{folder}.storage_alignment"), source)
    has_crc = any(entry.CRC for entry in by_name.values() if entry.file_size)  # torch can write 0 for all of them
    for name, entry in by_name.items():
        if name.startswith(f"{folder}data/"):
            exact = exact_offsets or not alignment
            offset = _local_offset(source, entry.header_offset) if exact else _aligned_offset(entry, alignment)
            crc = entry.CRC if has_crc else None
            storages[name.removeprefix(f"{folder}data/")] = Storage(offset, entry.file_size, crc, entry.header_offset)
            if offset + entry.file_size > source.size:
                raise corrupt(f"{source.name}: zip entry {quoted(name)} ends behind the file")
    if exact_offsets:
        # A byte of the file belongs to one storage at most: it is written to one place while it arrives.
        for key, storage in sorted(storages.items(), key=lambda item: item[1].offset):
            if storage.offset < end and storage.nbytes:
                raise corrupt(f"{source.name}: zip entry {quoted(f'{folder}data/{key}')} lies inside another one")
            end = max(end, storage.offset + storage.nbytes)
    return storages


def _alignment(entry: zipfile.ZipInfo | None, source: ByteSource) -> int:
    """Return the multiple of bytes at which storages begin, as torch notes it; 0 if the note cannot be read."""
    text = b"64" if entry is None else _member(source, entry) if entry.file_size < 20 else b""
    return int(text) if text.isdigit() and 0 < int(text) <= 1 << 16 else 0


def _read_legacy(stream: CachedSource, source: ByteSource, exact_offsets: bool) -> tuple[Any, dict[str, Storage]]:
    """Five pickles (magic, protocol, system, object, storage keys), then each storage with its length before it."""
    header = [read_pickle(stream, source.name) for _ in range(3)]
    if header[:2] != [_LEGACY_MAGIC, _LEGACY_PROTOCOL]:
        raise CheckpointError(
            f"{source.name} is a plain pickle, not a torch checkpoint",
            code="checkpoint_format",
            hint="save the tensors with torch.save",
        )
    if not isinstance(header[2], dict) or header[2].get("little_endian") is not True:
        raise unsupported(
            f"{source.name} was written on a big-endian machine",
            "load it with torch and save it on a little-endian machine",
        )
    root = read_pickle(stream, source.name, allow_opaque=True)
    keys = read_pickle(stream, source.name)
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise corrupt(f"{source.name}: the list of storages is not one")
    # Include storages of dropped values: their bytes lie in between.
    below = (value.storage if isinstance(value, TensorRef) else value for value in values_below(root))
    refs = {ref.key: ref for ref in below if isinstance(ref, StorageRef)}
    return root, _legacy_storages(keys, refs, stream.tell(), source, exact_offsets)


def _legacy_storages(
    keys: list[str], refs: Mapping[str, StorageRef], offset: int, source: ByteSource, exact_offsets: bool
) -> dict[str, Storage]:
    storages = {}
    for key in keys:
        if key not in refs:
            raise unsupported(f"{source.name}: storage {key} belongs to no tensor")
        if key in storages:
            raise corrupt(f"{source.name}: storage {key} is listed twice")
        storages[key] = Storage(offset + 8, refs[key].nbytes, None)
        offset += 8 + refs[key].nbytes
    if offset > source.size:
        raise corrupt(f"{source.name} has {source.size} bytes, its storages need {offset}")
    if exact_offsets:
        # Before each storage its number of elements is written once more: there is no other sign of damage.
        for key, storage in storages.items():
            count, numel = int.from_bytes(source.read_at(storage.offset - 8, 8), "little"), refs[key].numel
            if count != numel:
                raise corrupt(f"{source.name}: storage {key} begins with the length {count}, its tensors say {numel}")
    return storages


def _entries(tensors: Mapping[str, TensorRef], storages: Mapping[str, Storage], name: str) -> dict[str, TensorEntry]:
    for key, (tensor, ref) in tensors.items():
        if tensor.dtype not in ITEM_SIZES:
            raise unsupported(
                f"{name}: tensor {key} has the dtype {tensor.dtype}, which is not read",
                f"save it with another dtype; dtypes: {', '.join(ITEM_SIZES)}",
            )
        storage, declared = storages.get(tensor.storage), ref.nbytes
        if storage is None:
            raise corrupt(f"{name}: tensor {key} names storage {tensor.storage}, which the file lacks")
        last = tensor.offset + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.strides, strict=True))
        reach = (last + 1) * ITEM_SIZES[tensor.dtype] if prod(tensor.shape) else 0
        if declared != storage.nbytes or reach > storage.nbytes:
            raise corrupt(
                f"{name}: tensor {key} of shape {tensor.shape} needs {max(reach, declared)} bytes of storage "
                f"{tensor.storage}, which has {storage.nbytes}"
            )
    return {key: ref.entry for key, ref in tensors.items()}
