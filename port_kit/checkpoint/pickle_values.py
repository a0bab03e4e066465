"""The values of a torch checkpoint's pickle: records in place of storages and tensors, and the allow list.

No object is built and no module imported. A global outside the allow list becomes an :class:`Opaque` value; see
:mod:`port_kit.checkpoint.unpickler`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from math import prod
from typing import Any, NamedTuple

from port_kit.dtypes import DTYPES, ITEM_SIZES
from port_kit.errors import CheckpointError

_TYPED_STORAGES = {dtype.storage: dtype.name for dtype in DTYPES.values() if dtype.storage}
#: Dtypes of torch that pickles may have and the table has not: refused once the tensor's name is known.
_UNSUPPORTED_DTYPES = frozenset(("complex32", "bits8", "bits16", "bits1x8", "bits2x4", "bits4x2"))
_UNTYPED = {("torch.storage", "UntypedStorage"), ("torch", "UntypedStorage")}
_LONGEST_KEY = 1 << 16
_MOST_AXES = 64  # torch's own limit
_MOST_ELEMENTS = 1 << 60


class Global(NamedTuple):
    """A global that a pickle names; it is never imported."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


class StorageRef(NamedTuple):
    """A storage as the pickle declares it: ``numel`` elements of ``dtype``, bytes if ``dtype`` is None."""

    key: str
    dtype: str | None
    numel: int

    @property
    def nbytes(self) -> int:
        """Bytes of the storage."""
        return self.numel * ITEM_SIZES[self.dtype or "uint8"]


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


class TensorRef(NamedTuple):
    """A tensor and its storage as the pickle declares it."""

    entry: TensorEntry
    storage: StorageRef


class Opaque:
    """A value that was not built: a global outside the allow list, or the result of a call of one.

    Attributes:
        name: the global.
        parts: its arguments in the pickle.
    """

    __slots__ = ("name", "parts")

    def __init__(self, name: str, *parts: Any) -> None:
        self.name, self.parts = name, list(parts)


#: Data that torch itself takes for safe.
_PLAIN_OBJECTS = {"_codecs.encode", "collections.defaultdict", "collections.Counter", "torch.device"}
for _name in ("set", "frozenset", "bytearray", "complex"):
    _PLAIN_OBJECTS |= {f"builtins.{_name}", f"__builtin__.{_name}"}


def values_below(root: Any) -> Iterator[Any]:
    """Yield ``root`` and everything in it: items of dicts, lists and tuples, and parts of opaque values, each once."""
    stack, seen = [root], set()
    while stack:
        value = stack.pop()
        yield value
        if isinstance(value, (TensorRef, StorageRef, Global)):
            continue
        if isinstance(value, (dict, list, tuple, Opaque)) and id(value) not in seen:
            seen.add(id(value))
            if isinstance(value, dict):
                stack.extend(value)
                stack.extend(value.values())
            else:
                stack.extend(value.parts if isinstance(value, Opaque) else value)


def refuse_opaque(root: Any, where: str, key: str = "") -> None:
    """Refuse a value that would have to be built by a global that is not on the allow list.

    Args:
        root: the value.
        where: name of the pickle for messages.
        key: under which the value lies, if it can be left out by that.

    Raises:
        CheckpointError: ``pickle_unsafe``.
    """
    for value in values_below(root):
        if isinstance(value, Opaque) and value.name not in _PLAIN_OBJECTS:
            raise unsafe(where, f"the global {value.name}", value.name, key)


#: packages whose objects lie in training checkpoints without bad intent
_HARMLESS_LOOKING = {"torch", "numpy", "argparse", "pathlib", "omegaconf", "collections", "transformers", "diffusers"}


def unsafe(where: str, what: str, found: str, key: str = "") -> CheckpointError:
    """Return the error for a pickle that requires ``what``; dropping ``key`` avoids it, if given."""
    hint = "do not load this file with torch.load either unless you trust where it comes from"
    if found.partition(".")[0] in _HARMLESS_LOOKING:
        hint = "save only the tensors: torch.save(model.state_dict(), path), without other objects beside them"
    if key:
        hint = f"leave it out if it is not needed: --drop {key} (in a recipe: drop)"
    return CheckpointError(
        f"{where}: the pickle asks for {what}, which no plain checkpoint needs; nothing was executed",
        code="pickle_unsafe",
        hint=hint,
        found=found,
    )


def corrupt(message: str, hint: str = "the file is damaged or cut short: fetch it again") -> CheckpointError:
    """Return the error for a checkpoint that contradicts itself or its format."""
    return CheckpointError(message, code="pickle_corrupt", hint=hint)


def unsupported(
    message: str, hint: str = "save only the tensors: torch.save(model.state_dict(), path)"
) -> CheckpointError:
    """Return the error for a valid checkpoint with values that the kit or safetensors does not support."""
    return CheckpointError(message, code="pickle_unsupported", hint=hint)


def fill(target: dict[Any, Any], pairs: Iterable[tuple[Any, Any]], where: str) -> dict[Any, Any]:
    """Put pairs into a dict. Keys are plain: others take unbounded time to hash, or more stack than there is."""
    for key, value in pairs:
        if not (_is_plain(key) or (type(key) is tuple and len(key) < _MOST_AXES and all(map(_is_plain, key)))):
            raise unsupported(f"{where}: {describe(key)} is a dict's key; plain values of moderate length are required")
        target[key] = value
    return target


def _is_plain(key: Any) -> bool:
    if isinstance(key, (str, bytes)):
        return len(key) < _LONGEST_KEY
    return (
        key is None or isinstance(key, (float, Global, Opaque)) or (isinstance(key, int) and abs(key) < _MOST_ELEMENTS)
    )


def describe(value: Any) -> str:
    if isinstance(value, Opaque):
        return value.name[:200]
    return str(value)[:200] if isinstance(value, Global) else f"a {type(value).__name__}"


def is_allowed(found: Global) -> bool:
    """Return True if a global is on the allow list."""
    known = found in CALLS or found in _TENSOR_TYPES or found in _UNTYPED
    return known or _storage_dtype(found) is not None or _dtype(found) is not None


def _storage_dtype(found: Global) -> str | None:
    return _TYPED_STORAGES.get(found.name) if found.module in ("torch", "torch.cuda", "torch.storage") else None


def _dtype(found: Global) -> str | None:
    known = found.name in DTYPES or found.name in _UNSUPPORTED_DTYPES
    return found.name if found.module == "torch" and known else None


def build_storage(identity: Any, where: str) -> StorageRef:
    """Read torch's persistent id ``("storage", type, key, location, numel)``; old files add a view, which is None."""
    if not isinstance(identity, tuple) or len(identity) not in (5, 6) or identity[0] != "storage":
        raise corrupt(f"{where}: a persistent id that is not torch's")
    _, kind, key, _, numel = identity[:5]
    if not isinstance(kind, Global) or not isinstance(key, str) or not _is_count(numel) or len(key) > _LONGEST_KEY:
        raise corrupt(f"{where}: a storage without type, key or length")
    if len(identity) == 6 and identity[5] is not None:
        raise unsupported(f"{where}: storage {key} is a view of another storage")
    if kind in _UNTYPED:
        return StorageRef(key, None, numel)
    dtype = _storage_dtype(kind)
    if dtype is None:
        raise unsupported(f"{where}: storage {key} is of type {kind}")
    return StorageRef(key, dtype, numel)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62


def _tensor(arguments: tuple[Any, ...], where: str) -> TensorRef:
    """``torch._utils._rebuild_tensor`` and ``_v2``: (storage, offset, size, stride, grad, hooks[, metadata])."""
    storage = arguments[0] if arguments else None
    if not isinstance(storage, StorageRef) or storage.dtype is None:
        raise corrupt(f"{where}: a tensor without a typed storage")
    return _view(storage, storage.dtype, arguments[1:4], arguments[6:7], where)


def _tensor_v3(arguments: tuple[Any, ...], where: str) -> TensorRef:
    """``torch._utils._rebuild_tensor_v3``: the storage has no type, the dtype comes seventh, metadata eighth."""
    storage, dtype = arguments[0], _dtype(arguments[6]) if isinstance(arguments[6], Global) else None
    if not isinstance(storage, StorageRef) or dtype is None:
        raise unsupported(f"{where}: a tensor of unknown type {describe(arguments[6])}")
    return _view(storage, dtype, arguments[1:4], arguments[7:8], where)


def _view(
    storage: StorageRef, dtype: str, geometry: tuple[Any, ...], metadata: tuple[Any, ...], where: str
) -> TensorRef:
    offset, shape, strides = geometry
    whole = _is_count(offset) and isinstance(shape, tuple) and isinstance(strides, tuple)
    whole = whole and len(shape) == len(strides) <= _MOST_AXES and all(map(_is_count, (*shape, *strides)))
    if not whole or prod(filter(None, shape)) > _MOST_ELEMENTS:
        raise corrupt(f"{where}: a tensor whose shape or strides are not lengths")
    flags = metadata[0] if metadata and isinstance(metadata[0], dict) else {}
    lazy = [name for name in ("conj", "neg") if flags.get(name)]
    if lazy:
        raise unsupported(
            f"{where}: a tensor of shape {shape} carries a lazy operation ({', '.join(lazy)})",
            "save it after tensor.resolve_conj().resolve_neg()",
        )
    return TensorRef(TensorEntry(shape, dtype, storage.key, offset, strides), storage)


def _parameter(arguments: tuple[Any, ...], where: str) -> TensorRef:
    """``torch._utils._rebuild_parameter`` and ``_with_state``: (tensor, ...); files hold no attributes of tensors."""
    if not arguments or not isinstance(arguments[0], TensorRef):
        raise corrupt(f"{where}: a parameter without a tensor")
    return arguments[0]


def _of_type(arguments: tuple[Any, ...], where: str) -> TensorRef:
    """``torch._tensor._rebuild_from_type_v2``: (function, type, arguments, state) of a tensor with attributes."""
    function, kind, values = arguments[:3]
    if function not in CALLS or kind not in _TENSOR_TYPES or not isinstance(values, tuple):
        raise unsupported(f"{where}: a tensor of the type {describe(kind)}")
    return _parameter((CALLS[function](values, where),), where)


def _ordered_dict(arguments: tuple[Any, ...], where: str) -> dict[Any, Any]:
    """Empty, to be filled afterwards; Python 2 gave a list of pairs."""
    (content,) = arguments or ((),)
    return fill({}, content.items() if isinstance(content, dict) else content, where)


def _size(arguments: tuple[Any, ...], where: str) -> tuple[int, ...]:
    if len(arguments) != 1 or not isinstance(arguments[0], (tuple, list)) or not all(map(_is_count, arguments[0])):
        raise corrupt(f"{where}: a size that is not a tuple of lengths")
    return tuple(arguments[0])


CALLS: dict[Global, Callable[[tuple[Any, ...], str], Any]] = {
    Global("torch._utils", "_rebuild_tensor"): _tensor,
    Global("torch._utils", "_rebuild_tensor_v2"): _tensor,
    Global("torch._utils", "_rebuild_tensor_v3"): _tensor_v3,
    Global("torch._utils", "_rebuild_parameter"): _parameter,
    Global("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    Global("torch._tensor", "_rebuild_from_type_v2"): _of_type,
    Global("collections", "OrderedDict"): _ordered_dict,
    Global("torch", "Size"): _size,
}

_TENSOR_TYPES = (
    Global("torch", "Tensor"),
    Global("torch._tensor", "Tensor"),
    Global("torch.nn.parameter", "Parameter"),
)

COPYING = (Global("collections", "OrderedDict"), Global("torch", "Size"))
