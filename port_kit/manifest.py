"""Manifests: names, shapes and dtypes of a checkpoint or of a module, without values.

A :class:`Manifest` is read from safetensors headers, the tables of a pickle checkpoint, a module (also on the meta
device) or JSON. The JSON form is ``{"name": [[shape...], "dtype"], ...}``. An entry may have a third item, a mapping
with ``slots`` of a fused parameter, ``buffer`` and ``file``. A bare ``[shape...]`` is read as float32.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection, ItemsView, Iterable, Iterator, KeysView, Mapping, ValuesView
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from port_kit.dtypes import BY_WORD, ITEM_SIZES, torch_shape
from port_kit.errors import RemapError
from port_kit.escape import quoted, reason_of
from port_kit.files import read_text

if TYPE_CHECKING:
    from torch import nn

Slot = tuple[tuple[int, int], ...]
Stamp = tuple[int, int, int, int]

#: Key of the safetensors metadata that records the naming of a file, and its valid values.
NAMING_KEY = "port_kit.names"
NAMINGS = ("original", "converted")
_INTEGER = frozenset({int})  # True and 1.0 equal 1, but are not valid extents


@dataclass(frozen=True)
class TensorSpec:
    """Description of one tensor.

    Attributes:
        shape: extents; for a sharded parameter, those of the complete parameter, as in a checkpoint.
        dtype: name in torch, ``bfloat16``.
        file: path of its file, relative to the checkpoint; empty for modules.
        slots: shards of a fused parameter, ``{shard_id: ((start, stop), ...)}`` with one pair per axis.
        buffer: True for a buffer of a module, False for a parameter.
    """

    shape: tuple[int, ...]
    dtype: str
    file: str = ""
    slots: Mapping[str, Slot] = field(default_factory=dict, hash=False)
    buffer: bool = False

    def to_json(self, *, with_file: bool = True) -> list[Any]:
        """Return the entry of the JSON form."""
        extra: dict[str, Any] = {}
        if self.slots:
            extra["slots"] = {slot: [list(pair) for pair in box] for slot, box in self.slots.items()}
        if self.buffer:
            extra["buffer"] = True
        if self.file and with_file:
            extra["file"] = self.file
        return [list(self.shape), self.dtype, *([extra] if extra else [])]

    @cached_property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @cached_property
    def nbytes(self) -> int:
        """Bytes of the complete tensor."""
        return self.numel * ITEM_SIZES[self.dtype]


class Manifest(Mapping[str, TensorSpec]):
    """An immutable mapping of tensor names to :class:`TensorSpec`.

    Args:
        entries: ``{name: TensorSpec}`` or ``{name: (shape, dtype)}``.
        origin: source of the manifest, for messages.
        aliases: further names of tensors that a module shares, ``{name: name in the manifest}``.
        places: of a safetensors checkpoint, ``{name: offset}`` of each tensor's bytes in its file.
        stamps: of a checkpoint on disk, the :func:`stamp` of each file at the time its header was read.
        naming: naming that the metadata of the files record: ``original`` (of the original implementation),
            ``converted`` (of the module), ``converted:NAME`` (by the rule set of that name), or empty if there is no
            record.
        notes: omitted parts of the checkpoint, one sentence each.
    """

    def __init__(
        self,
        entries: Mapping[str, TensorSpec | tuple[Iterable[int], str]],
        *,
        origin: str = "",
        aliases: Mapping[str, str] | None = None,
        places: Mapping[str, int] | None = None,
        stamps: Mapping[str, Stamp] | None = None,
        naming: str = "",
        notes: Iterable[str] = (),
    ) -> None:
        self._entries = {
            name: entry if isinstance(entry, TensorSpec) else _spec(name, entry) for name, entry in entries.items()
        }
        _check_names(self._entries, origin)
        _check_dtypes(self._entries, origin)
        self.origin = origin
        self.aliases = dict(aliases or {})
        self.places = dict(places or {})
        self.stamps = dict(stamps or {})
        self.naming = naming
        self.notes = tuple(notes)

    def naming_for(self, rules: str) -> str:
        """Return the recorded naming relative to a rule set.

        ``other`` stands for names that another rule set converted; they may be the original names of this one.
        """
        kind, _, converter = self.naming.partition(":")
        if converter and rules == f"{converter}_inverse":  # the inverse rules apply to converted names
            return "original"
        return kind if converter in ("", rules) else "other"

    def __getitem__(self, name: str) -> TensorSpec:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def keys(self) -> KeysView[str]:
        return self._entries.keys()

    def values(self) -> ValuesView[TensorSpec]:
        return self._entries.values()

    def items(self) -> ItemsView[str, TensorSpec]:
        return self._entries.items()

    def __repr__(self) -> str:
        return f"Manifest({len(self)} tensors, {self.nbytes:,} bytes, {self.origin!r})"

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum([spec.nbytes for spec in self._entries.values()])

    # -- JSON --------------------------------------------------------------------------------------------------

    def to_json(self, *, with_files: bool = True) -> dict[str, Any]:
        """Return the JSON form; a recorded naming is in ``__metadata__``, as in a safetensors header."""
        head: dict[str, Any] = {"__metadata__": {NAMING_KEY: self.naming}} if self.naming else {}
        return head | {name: spec.to_json(with_file=with_files) for name, spec in self.items()}

    @classmethod
    def from_json(cls, data: object, *, origin: str = "JSON") -> Manifest:
        """Read the JSON form: an object, a text or the path of a file.

        Raises:
            RemapError: ``manifest_invalid``; names the invalid entry.
        """
        if isinstance(data, Path):
            origin, data = str(data), _read_text(data)
        if isinstance(data, str):
            data = parse_json(data, origin)
        if not isinstance(data, Mapping):
            raise invalid_manifest(f"{origin} is not an object of tensor names")
        entries = {
            name: _from_json_entry(name, entry, origin) for name, entry in data.items() if name != "__metadata__"
        }
        return cls(entries, origin=origin, naming=_naming(data, origin))

    # -- checkpoints -------------------------------------------------------------------------------------------

    @classmethod
    def from_checkpoint(cls, path: str | Path, wrapper: str = "") -> Manifest:
        """Read a file, an index or a folder: safetensors, else torch checkpoints, else JSON. Tensors are not read.

        An index selects the files and their tensors.

        Args:
            path: the file or folder.
            wrapper: of a torch checkpoint, the keys above its tensors, dotted (``generator``, ``app.model``); ``.`` for
                the top level of a file that has tensors at several levels.

        Raises:
            RemapError: ``manifest_invalid`` for a missing file, a broken header, a name in two files without an index,
                or an index that disagrees with its files; ``remap_mixed`` for files that record different namings.
            CheckpointError: from :func:`port_kit.checkpoint.pickle_reader.read_tables`, and ``checkpoint_format`` for
                an unsupported format.
        """
        path = Path(path)
        if path.suffix == ".json" and not path.name.endswith(".index.json"):
            return cls.from_json(path)
        from port_kit.checkpoint.reader import read_local

        return read_local(path, wrapper)

    @classmethod
    def from_safetensors(cls, path: str | Path) -> Manifest:
        """Read safetensors headers of a file, of a folder of files, or of the files of an index.

        Raises:
            RemapError, CheckpointError: see :meth:`from_checkpoint`.
        """
        from port_kit.checkpoint.reader import read_local

        return read_local(Path(path), formats=("safetensors",))

    @classmethod
    def from_pickle(cls, path: str | Path, wrapper: str = "") -> Manifest:
        """Read the tables of a torch checkpoint with any suffix, without executing code of it.

        Raises:
            RemapError, CheckpointError: see :meth:`from_checkpoint`.
        """
        from port_kit.checkpoint.reader import read_local

        return read_local(Path(path), wrapper, formats=("torch",))

    @classmethod
    def from_header(
        cls, header: Mapping[str, Any], *, file: str = "", origin: str = "", start: int = 0, stamp: Stamp | None = None
    ) -> Manifest:
        """Read a parsed safetensors header.

        Args:
            header: its entries.
            file: the name of the file.
            origin: source of the header, for messages.
            start: offset of the file's data.
            stamp: of the file, if it is on disk.

        Raises:
            RemapError: ``manifest_invalid`` for an invalid entry, or for gaps or overlaps between tensors.
        """
        origin = origin or file
        entries: dict[str, TensorSpec] = {}
        spans: list[tuple[int, int, str]] = []
        alike: dict[object, TensorSpec] = {}  # most tensors equal one of an earlier layer
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            try:
                word, values = str(entry["dtype"]), tuple(entry["shape"])
                first, last = entry["data_offsets"]
            except (KeyError, TypeError, ValueError) as error:
                raise invalid_manifest(
                    f"{origin}: header entry {quoted(name)} cannot be read: {quoted(entry)}"
                ) from error
            spec = alike.get((word, values)) if _INTEGER.issuperset(map(type, values)) else None
            if spec is None:
                spec = alike[word, values] = _header_spec(name, word, values, file, origin)
            entries[name] = spec
            if type(first) is not int or type(last) is not int or last - first != spec.nbytes:
                raise invalid_manifest(
                    f"{origin}: {quoted(name)} of {spec.nbytes} bytes is at {quoted(first)} to {quoted(last)}"
                )
            spans.append((first, last, name))
        at = 0
        for first, last, name in sorted(spans):
            if first != at:
                raise invalid_manifest(f"{origin}: {quoted(name)} begins at {first}; the tensors before it end at {at}")
            at = last
        places = {name: start + first for first, _, name in spans}
        return cls(
            entries,
            origin=origin,
            places=places,
            stamps={} if stamp is None else {file: stamp},
            naming=_naming(header, origin),
        )

    # -- modules -----------------------------------------------------------------------------------------------

    @classmethod
    def from_module(cls, module: nn.Module, *, prefix: str = "") -> Manifest:
        """Read a module's parameters and persistent buffers; the module may be on the meta device.

        vLLM's parallel linears are recognized by their attributes (``output_sizes``, ``total_num_kv_heads``). Shapes
        are those of the complete parameter for any tensor-parallel size, and fused parameters have ``slots``.
        """
        from port_kit.targets import read_targets

        found = read_targets(module)
        return cls(
            {prefix + name: target.spec for name, target in found.targets.items()},
            origin=type(module).__name__,
            aliases={prefix + name: prefix + other for name, other in found.aliases.items()},
        )

    def under(self, prefix: str) -> Manifest:
        """Return this manifest with a prefix before all names."""
        return Manifest(
            {prefix + name: spec for name, spec in self.items()},
            origin=self.origin,
            aliases={prefix + name: prefix + other for name, other in self.aliases.items()},
            naming=self.naming,
            notes=self.notes,
        )


def _naming(header: Mapping[str, Any], origin: str) -> str:
    """Return the naming in a header's metadata, empty if there is none."""
    metadata = header.get("__metadata__")
    naming = metadata.get(NAMING_KEY, "") if isinstance(metadata, Mapping) else ""
    if naming and str(naming).partition(":")[0] not in NAMINGS:
        raise invalid_manifest(f"{origin} has {NAMING_KEY} = {quoted(naming)}", f"it is one of: {', '.join(NAMINGS)}")
    return str(naming)


def _spec(name: str, entry: tuple[Iterable[int], str]) -> TensorSpec:
    shape, dtype = entry
    return _checked(name, TensorSpec(tuple(shape), dtype), "manifest")


def _check_names(names: Collection[str], origin: str) -> None:
    """Raise RemapError for names that cannot be stored, and for ``#``, the layer number in templates."""
    text = "".join(names)
    if "#" in text:
        marked = next(name for name in names if "#" in name)
        raise invalid_manifest(
            f"{origin or 'manifest'}: {quoted(marked)} contains #", "# stands for a layer number: rename the tensor"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        shown = error.object[max(error.start - 20, 0) : error.end + 20]
        raise invalid_manifest(
            f"{origin or 'manifest'}: {quoted(shown)} is not a valid text", "names are Unicode without surrogates"
        ) from error


def _check_dtypes(entries: Mapping[str, TensorSpec], origin: str) -> None:
    if not ITEM_SIZES.keys() >= {spec.dtype for spec in entries.values()}:
        for name, spec in entries.items():
            _checked(name, spec, origin or "manifest")


def _header_spec(name: str, word: str, values: tuple[Any, ...], file: str, origin: str) -> TensorSpec:
    """Return the spec of one entry of a safetensors header; its shapes count values, a spec's count elements."""
    dtype = BY_WORD.get(word)
    if dtype is None:
        raise invalid_manifest(
            f"{origin}: {quoted(name)} has the unknown dtype {quoted(word)}", f"dtypes: {', '.join(BY_WORD)}"
        )
    spec = _checked(name, TensorSpec(values, dtype.name, file), origin)
    try:
        return spec if dtype.packed == 1 else TensorSpec(torch_shape(dtype, values), dtype.name, file)
    except ValueError as error:
        raise invalid_manifest(f"{origin}: {quoted(name)}: {reason_of(error)}") from error


def _checked(name: str, spec: TensorSpec, origin: str) -> TensorSpec:
    if type(spec.dtype) is not str or spec.dtype not in ITEM_SIZES:
        raise invalid_manifest(
            f"{origin}: {quoted(name)} has the dtype {quoted(spec.dtype)}", f"dtypes: {', '.join(ITEM_SIZES)}"
        )
    if any(type(extent) is not int or extent < 0 for extent in spec.shape):
        raise invalid_manifest(
            f"{origin}: {quoted(name)} has the shape {quoted(spec.shape)}", "extents are integers from 0 up"
        )
    return spec


def parse_json(text: str | bytes, origin: str) -> Any:
    """Parse JSON.

    Raises:
        RemapError: ``manifest_invalid``, also for too deep nesting or numbers of thousands of digits.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise invalid_manifest(f"{origin} is not JSON: {reason_of(error)}") from error


def _from_json_entry(name: str, entry: object, origin: str) -> TensorSpec:
    wrong = f"{origin}: {quoted(name)} is {quoted(entry)}"
    if isinstance(entry, (list, tuple)) and all(type(extent) is int for extent in entry):
        entry = (entry, "float32")  # names and shapes only, as in tables of other tools
    if not isinstance(entry, (list, tuple)) or len(entry) not in (2, 3) or not isinstance(entry[0], (list, tuple)):
        raise invalid_manifest(wrong, 'an entry is [[extents], "dtype"] or has a third item with slots, buffer or file')
    extra = entry[2] if len(entry) == 3 else {}
    try:
        slots = {str(slot): tuple((int(a), int(b)) for a, b in box) for slot, box in extra.get("slots", {}).items()}
        buffer, file = bool(extra.get("buffer", False)), str(extra.get("file", ""))
    except (AttributeError, TypeError, ValueError) as error:
        raise invalid_manifest(wrong, "slots are {slot: [[start, stop], ...]}") from error
    return _checked(name, TensorSpec(tuple(entry[0]), entry[1], file, slots, buffer), origin)


def stamp(descriptor: int) -> Stamp:
    """Return a key that identifies the content of an open file."""
    found = os.fstat(descriptor)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _read_text(path: Path) -> str:
    try:
        return read_text(path)
    except (OSError, UnicodeDecodeError) as error:
        raise invalid_manifest(f"{path} cannot be read: {reason_of(error)}") from error


def invalid_manifest(message: str, hint: str = "check the file and how it was made", **details: object) -> RemapError:
    """Return the error for an invalid manifest or checkpoint."""
    return RemapError(message, code="manifest_invalid", hint=hint, **details)
