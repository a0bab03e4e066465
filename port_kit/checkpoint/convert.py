"""Convert a torch checkpoint on disk to safetensors in constant memory, without executing it; checks every CRC."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from port_kit.checkpoint.byte_layout import read_exactly
from port_kit.checkpoint.byte_sources import FileSource
from port_kit.checkpoint.pickle_reader import crc32, read_tables
from port_kit.checkpoint.safetensors_writer import SafetensorsLayout, plan_layout, require_crc
from port_kit.errors import DownloadError
from port_kit.escape import reason_of
from port_kit.files import allocate, begin_writing_out, create_temporary, os_errors_as, publish, require_space

# Fits a core's cache. Larger pieces are written to larger free pages, and those a virtual machine may have handed back
# to its host: getting them again took longer than all the rest.
_PIECE = 1 << 18
_WRITTEN_OUT_AT_ONCE = 16 << 20


@dataclass(frozen=True)
class Conversion:
    """The result of a conversion; ``unchanged`` if the target held this very content already."""

    source: Path
    target: Path
    tensors: int
    size: int
    unchanged: bool


def convert_file(
    source: str | Path,
    target: str | Path,
    *,
    wrapper: str = "",
    drop: Sequence[str] = (),
    remember: bool = True,
    advance: Callable[[int], None] = lambda count: None,
) -> Conversion:
    """Write the tensors of a ``.pth``, ``.pt`` or ``.bin`` file as a safetensors file with the same names.

    Args:
        source: the checkpoint, zip or legacy container.
        target: the file to write; it appears complete or not at all.
        wrapper: the keys above the tensors, dotted.
        drop: names of values that are left out on purpose.
        remember: compare a target that is there, and leave it if it holds this very content; else it is written anew.
        advance: called with the number of source bytes that were copied.

    Raises:
        CheckpointError: the source is damaged, unsafe, or holds a tensor that safetensors cannot represent.
        DownloadError: the target cannot be written.
    """
    source, target = Path(source), Path(target)
    if not source.is_file():
        raise DownloadError(f"there is no file {source}", code="source_missing", hint="check the path")
    with os_errors_as(target):
        if target.exists() and target.samefile(source):
            raise DownloadError(f"{target} is the source itself", code="output_dir", hint="name another target")
        if target.exists() and not target.is_file():
            raise DownloadError(f"{target} is no file", code="output_dir", hint="name the file that is to be written")
    with os_errors_as(source, "source_missing", "check the file's rights"), FileSource(source) as opened:
        layout = plan_layout(read_tables(opened, wrapper, drop=drop), opened.name)
        unchanged = remember and target.exists() and layout.is_content_of(target, opened)
        if not unchanged:
            _write(layout, opened, target, advance)
    return Conversion(source, target, len(layout.placements), layout.size, unchanged)


def _write(layout: SafetensorsLayout, source: FileSource, target: Path, advance: Callable[[int], None]) -> None:
    with os_errors_as(target):
        require_space(target.parent, layout.size)
        temporary, descriptor = create_temporary(target)
        try:
            allocate(descriptor, layout.size)
            _copy_storages(layout, source, descriptor, advance)
            layout.complete(source, descriptor)
            os.fsync(descriptor)
            publish(temporary, target)
        finally:
            os.close(descriptor)
            temporary.unlink(missing_ok=True)


def _copy_storages(
    layout: SafetensorsLayout, source: FileSource, descriptor: int, advance: Callable[[int], None]
) -> None:
    """Copy the used storages in small pieces, and compare their checksums with the zip directory's."""
    places, buffer, unwritten = layout.byte_layout(), memoryview(bytearray(_PIECE)), 0
    for key, storage in layout.used_storages.items():
        value, offset, end = 0, storage.offset, storage.offset + storage.nbytes
        while offset < end:
            # Complete pages of the written file: no page is touched twice, and the system writes large units.
            view = buffer[: min(places.until_aligned(offset, _PIECE), end - offset)]
            try:
                read_exactly(source.descriptor, view, offset)
            except OSError as error:
                raise DownloadError(
                    f"{source.name} cannot be read: {reason_of(error)}", code="source_missing"
                ) from error
            # Bytes that the layout places behind the end are gathered later.
            places.write(descriptor, offset, view, end=layout.size)
            value = crc32(view, value) if storage.crc is not None else 0
            offset, unwritten = offset + len(view), unwritten + len(view)
            if unwritten >= _WRITTEN_OUT_AT_ONCE:
                begin_writing_out(descriptor)
                unwritten = 0
            advance(len(view))
        require_crc(storage, key, value, source.name)
