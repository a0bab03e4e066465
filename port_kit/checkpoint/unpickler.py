"""A pickle interpreter that executes nothing.

The opcodes are decoded by :mod:`pickletools`, which only reads. Here they build dicts, lists, tuples, numbers and
strings; a global is a pair of names, never an imported object. Calling one that is on the allow list builds a
:class:`StorageRef` or a :class:`TensorRef`, which are records of offsets and shapes. Any other global becomes an
:class:`Opaque` value, which remembers what it was to be built from. The allow list applies to what is kept: whoever
reads the result refuses opaque values there, and leaves out the rest. One that cannot be found in the result is refused
at once. Memory is bounded by the pickle's length.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Iterable, Iterator
from math import prod
from typing import Any, BinaryIO, NamedTuple

from port_kit.checkpoint.dtypes import DTYPES
from port_kit.errors import CheckpointError

_TYPED_STORAGES = {dtype.storage: dtype.name for dtype in DTYPES.values() if dtype.storage}
#: Dtypes of torch that pickles may have and the table has not: refused once the tensor's name is known.
_UNSUPPORTED_DTYPES = frozenset(("complex32", "bits8", "bits16", "bits1x8", "bits2x4", "bits4x2"))
_UNTYPED = {("torch.storage", "UntypedStorage"), ("torch", "UntypedStorage")}
LONGEST_PICKLE = 1 << 28
_MOST_OPCODES = 50_000_000
_LONGEST_KEY = 1 << 16
_LARGEST_MEMO = 1 << 32
_MOST_AXES = 64  # torch's own limit
# Bytes of memory that a pickle may take: so many for each of its own, and a few megabytes more at its densest place.
_CREDIT = 10
_MOST_DEBT = 6 << 20
# Bytes that an opcode's result takes, its place on the stack included.
_COSTS = {
    **dict.fromkeys(("EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET", "LIST", "DICT", "FROZENSET", "TUPLE", "TUPLE3"), 72),
    **dict.fromkeys(("TUPLE1", "TUPLE2"), 60),
    **dict.fromkeys(("INT", "BININT", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"), 40),
    **dict.fromkeys(("REDUCE", "BINPERSID", "NEWOBJ", "NEWOBJ_EX", "OBJ", "INST", "GLOBAL", "STACK_GLOBAL"), 130),
}
_COST = 8  # of the others
_COST_OF_TEXT = 60
_COST_OF_ITEM = 60
_COST_OF_FAR_MEMO = 110
_MOST_ELEMENTS = 1 << 60


class Global(NamedTuple):
    """A name that a pickle asks for; it stays a name."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


class StorageRef(NamedTuple):
    """A storage as the pickle declares it: ``numel`` elements of ``dtype``, bytes where ``dtype`` is None."""

    key: str
    dtype: str | None
    numel: int


class TensorRef(NamedTuple):
    """A view of a storage; ``offset`` and ``strides`` count elements."""

    storage: StorageRef
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Opaque:
    """A value that was not built: what a global that is not on the allow list names, or what a call of it returns.

    Attributes:
        name: the global.
        parts: what the pickle hands to it.
    """

    __slots__ = ("name", "parts")

    def __init__(self, name: str, *parts: Any) -> None:
        self.name, self.parts = name, list(parts)

    @property
    def is_plain(self) -> bool:
        """Return True for data that torch itself takes for safe, such as a set or a device."""
        return self.name in _PLAIN_OBJECTS


_PLAIN_OBJECTS = frozenset(
    f"{module}.{name}"
    for module, names in {
        "builtins": ("set", "frozenset", "bytearray", "complex"),
        "__builtin__": ("set", "frozenset", "bytearray", "complex"),
        "_codecs": ("encode",),
        "collections": ("defaultdict", "Counter"),
        "torch": ("device",),
    }.items()
    for name in names
)


class _Mark:
    """Where a group of stack items begins."""


_MARK = _Mark()


def read_pickle(stream: BinaryIO, where: str, *, allow_opaque: bool = False) -> Any:
    """Return what the pickle at the stream's position describes; afterwards the stream stands behind it.

    Args:
        stream: a seekable binary file.
        where: what messages call it.
        allow_opaque: the result may hold :class:`Opaque` values below its root; the caller leaves them out.

    Raises:
        CheckpointError: ``pickle_unsafe`` for a global or an action that is not on the allow list,
            ``pickle_unsupported`` for tensors that have no plain form, ``pickle_corrupt`` for anything unreadable.
    """
    machine = _Machine(where, allow_opaque)
    start = stream.tell()
    try:
        for count, (opcode, argument, position) in enumerate(pickletools.genops(stream)):
            if count > _MOST_OPCODES or (position or 0) - start > LONGEST_PICKLE:
                raise CheckpointError(f"{where}: the pickle is longer than any checkpoint's", code="pickle_corrupt")
            if opcode.name == "STOP":
                return machine.result()
            machine.step(opcode.name, argument, position or 0)
    except (ValueError, IndexError, KeyError, TypeError, EOFError, OverflowError, MemoryError) as error:
        reason = f"{type(error).__name__}: {error}"[:200]
        raise CheckpointError(f"{where}: the pickle cannot be read ({reason})", code="pickle_corrupt") from error
    raise CheckpointError(f"{where}: the pickle ends without STOP", code="pickle_corrupt")


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
        where: what messages call the pickle.
        key: under which the value lies, if it can be left out by that.

    Raises:
        CheckpointError: ``pickle_unsafe``.
    """
    for value in values_below(root):
        if isinstance(value, Opaque) and not value.is_plain:
            raise _unsafe(where, f"the global {value.name}", value.name, key)


class _Machine:
    """The stack, the memo and one method per group of opcodes."""

    def __init__(self, where: str, allow_opaque: bool) -> None:
        self._where, self._allow_opaque = where, allow_opaque
        self._stack: list[Any] = []
        self._memo: list[Any] = []  # by index, as picklers count
        self._far_memo: dict[int, Any] = {}
        self._opaque: list[Opaque] = []
        self._steps = self._copied = self._debt = self._position = 0

    def step(self, name: str, argument: Any, position: int) -> None:
        """Execute one opcode."""
        self._steps += 1
        cost = _COST_OF_TEXT + len(argument) if isinstance(argument, (str, bytes)) else _COSTS.get(name, _COST)
        self._charge(cost - _CREDIT * (position - self._position))
        self._position = position
        action = _ACTIONS.get(name)
        if action is None:
            raise self._refused(f"the opcode {name} at byte {position}")
        action(self, argument)

    def _charge(self, count: int) -> None:
        self._debt = max(0, self._debt + count)
        if self._debt > _MOST_DEBT:
            raise CheckpointError(
                f"{self._where}: the pickle would take far more memory than its own length",
                code="pickle_unsupported",
                hint="save only the tensors: torch.save(model.state_dict(), path)",
            )

    def result(self) -> Any:
        """Return the value on the stack, once every opaque value has been found in it."""
        root = self.pop()
        if self._opaque:
            if isinstance(root, Opaque):
                refuse_opaque(root, self._where)
            found = {id(value) for value in values_below(root) if isinstance(value, Opaque)}
            for value in self._opaque:
                if id(value) not in found:
                    raise _unsafe(self._where, f"the global {value.name}", value.name)
        return root

    def make_opaque(self, name: str, *parts: Any) -> Opaque:
        """Note a value that is not built."""
        if not self._allow_opaque:
            raise _unsafe(self._where, f"the global {name}", name)
        value = Opaque(name, *parts)
        self._opaque.append(value)
        return value

    def pop(self) -> Any:
        value = self._stack.pop()
        if value is _MARK:
            raise ValueError("a mark where a value is needed")
        return value

    def push(self, value: Any) -> None:
        self._stack.append(value)

    def make_dict(self, _: Any) -> None:
        """Collect the pairs above the mark in a new dict."""
        items = self.pop_to_mark()
        self.push({})
        self.set_items(items)

    def pop_to_mark(self) -> list[Any]:
        for index in range(len(self._stack) - 1, -1, -1):
            if self._stack[index] is _MARK:
                items = self._stack[index + 1 :]
                del self._stack[index:]
                return items
        raise ValueError("a group without a mark")

    def top(self, kind: type) -> Any:
        if not isinstance(self._stack[-1], (kind, Opaque)):
            raise self._refused(f"an update of {_describe(self._stack[-1])}")
        return self._stack[-1]

    def put(self, index: int) -> None:
        if not 0 <= index < _LARGEST_MEMO:
            raise ValueError("a memo index that no pickler counts to")
        if index == 1 and not self._memo:
            self._memo.append(_MARK)  # Python 2 counts from 1
        if index < len(self._memo):
            self._memo[index] = self._stack[-1]
        elif index == len(self._memo):
            self._memo.append(self._stack[-1])
        else:
            self._charge(_COST_OF_FAR_MEMO)
            self._far_memo[index] = self._stack[-1]

    def memoize(self, _: None) -> None:
        self.put(len(self._memo) + len(self._far_memo))

    def get(self, index: int) -> None:
        value = self._memo[index] if 0 <= index < len(self._memo) else self._far_memo[index]
        if value is _MARK:
            raise ValueError("a memo index that was not written to")
        self.push(value)

    def set_items(self, items: list[Any]) -> None:
        self._charge(_COST_OF_ITEM * (len(items) // 2))
        target = self.top(dict)
        if isinstance(target, Opaque):
            target.parts.append(items)
        else:
            _fill(target, zip(items[::2], items[1::2], strict=True), self._where)

    def append_items(self, items: list[Any]) -> None:
        target = self.top(list)
        (target.parts if isinstance(target, Opaque) else target).extend(items)

    def tuple_of(self, count: int) -> None:
        items = [self.pop() for _ in range(count)]
        self.push(tuple(reversed(items)))

    def find_global(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self._push_global(Global(module, name))

    def find_stacked_global(self, _: None) -> None:
        name, module = self.pop(), self.pop()
        if not (isinstance(name, str) and isinstance(module, str)):
            raise self._refused("a global whose name is not text")
        self._push_global(Global(module, name))

    def _push_global(self, found: Global) -> None:
        self.push(found if _is_allowed(found) else self.make_opaque(str(found)))

    def persistent(self, _: None) -> None:
        identity = self.pop()
        unknown = isinstance(identity, tuple) and len(identity) > 1 and isinstance(identity[1], Opaque)
        if unknown:
            self.push(self.make_opaque(f"the storage {identity[1].name}", identity))
        else:
            self.push(_storage(identity, self._where))

    def call(self, function: Any, *arguments: Any) -> None:
        """Call a global that is on the allow list; note the call of any other one."""
        if isinstance(function, Opaque):
            self.push(self.make_opaque(function.name, function, *arguments))
            return
        if not isinstance(function, Global) or function not in _CALLS or not isinstance(arguments[0], tuple):
            raise self._refused(f"a call of {_describe(function)}")
        # Each item was spelled out once; more copies than that are there to fill the memory.
        self._copied += sum(map(len, arguments[0])) if function in _COPYING else 0
        if self._copied > self._steps:
            raise self._refused("more copies of its own content than it holds items")
        self.push(_CALLS[function](arguments[0], self._where))

    def reduce(self, _: None) -> None:
        arguments, function = self.pop(), self.pop()
        self.call(function, arguments)

    def new_object(self, count: int) -> None:
        """Make an object of a class (NEWOBJ, NEWOBJ_EX): no class on the allow list is written so."""
        arguments = [self.pop() for _ in range(count)]
        self.call_class(self.pop(), arguments)

    def call_class(self, kind: Any, arguments: list[Any]) -> None:
        if not isinstance(kind, Opaque):
            raise self._refused(f"an object of {_describe(kind)}")
        self.call(kind, arguments)

    def object_from_mark(self, _: None) -> None:
        kind, *arguments = self.pop_to_mark()
        self.call_class(kind, arguments)

    def instance(self, argument: str) -> None:
        arguments = self.pop_to_mark()
        self.find_global(argument)
        self.call_class(self.pop(), arguments)

    def build(self, _: None) -> None:
        """State that torch keeps beside a dict (``_metadata``) carries no tensors; anything else has no state."""
        state, target = self.pop(), self.top(dict)
        if isinstance(target, Opaque):
            target.parts.append(state)

    def _refused(self, what: str) -> CheckpointError:
        return _unsafe(self._where, what, what)


def _unsafe(where: str, what: str, found: str, key: str = "") -> CheckpointError:
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


#: packages whose objects lie in training checkpoints without bad intent
_HARMLESS_LOOKING = {"torch", "numpy", "argparse", "pathlib", "omegaconf", "collections", "transformers", "diffusers"}


def _fill(target: dict[Any, Any], pairs: Iterable[tuple[Any, Any]], where: str) -> dict[Any, Any]:
    """Put pairs into a dict. Keys are plain: others take unbounded time to hash, or more stack than there is."""
    for key, value in pairs:
        if not (_is_plain(key) or (type(key) is tuple and len(key) < _MOST_AXES and all(map(_is_plain, key)))):
            raise CheckpointError(
                f"{where}: {_describe(key)} is a dict's key; plain values of moderate length are required",
                code="pickle_unsupported",
                hint="save only the tensors: torch.save(model.state_dict(), path)",
            )
        target[key] = value
    return target


def _is_plain(key: Any) -> bool:
    if isinstance(key, (str, bytes)):
        return len(key) < _LONGEST_KEY
    return (
        key is None or isinstance(key, (float, Global, Opaque)) or (isinstance(key, int) and abs(key) < _MOST_ELEMENTS)
    )


def _describe(value: Any) -> str:
    if isinstance(value, Opaque):
        return value.name[:200]
    return str(value)[:200] if isinstance(value, Global) else f"a {type(value).__name__}"


def _is_allowed(found: Global) -> bool:
    if found in _CALLS or found in _TENSOR_TYPES or found in _UNTYPED:
        return True
    return _storage_dtype(found) is not None or _dtype(found) is not None


def _storage_dtype(found: Global) -> str | None:
    return _TYPED_STORAGES.get(found.name) if found.module in ("torch", "torch.cuda", "torch.storage") else None


def _dtype(found: Global) -> str | None:
    known = found.name in DTYPES or found.name in _UNSUPPORTED_DTYPES
    return found.name if found.module == "torch" and known else None


def _storage(identity: Any, where: str) -> StorageRef:
    """Read torch's persistent id ``("storage", type, key, location, numel)``; old files add a view, which is None."""
    if not isinstance(identity, tuple) or len(identity) not in (5, 6) or identity[0] != "storage":
        raise CheckpointError(f"{where}: a persistent id that is not torch's", code="pickle_corrupt")
    _, kind, key, _, numel = identity[:5]
    if not isinstance(kind, Global) or not isinstance(key, str) or not _is_count(numel) or len(key) > _LONGEST_KEY:
        raise CheckpointError(f"{where}: a storage without type, key or length", code="pickle_corrupt")
    if len(identity) == 6 and identity[5] is not None:
        raise CheckpointError(f"{where}: storage {key} is a view of another storage", code="pickle_unsupported")
    if kind in _UNTYPED:
        return StorageRef(key, None, numel)
    dtype = _storage_dtype(kind)
    if dtype is None:
        raise CheckpointError(f"{where}: storage {key} is of type {kind}", code="pickle_unsupported")
    return StorageRef(key, dtype, numel)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62


def _tensor(arguments: tuple[Any, ...], where: str) -> TensorRef:
    """``torch._utils._rebuild_tensor`` and ``_v2``: (storage, offset, size, stride, grad, hooks[, metadata])."""
    storage = arguments[0] if arguments else None
    if not isinstance(storage, StorageRef) or storage.dtype is None:
        raise CheckpointError(f"{where}: a tensor without a typed storage", code="pickle_corrupt")
    return _view(storage, storage.dtype, arguments[1:4], arguments[6:7], where)


def _tensor_v3(arguments: tuple[Any, ...], where: str) -> TensorRef:
    """``torch._utils._rebuild_tensor_v3``: the storage has no type, the dtype comes seventh, metadata eighth."""
    storage, dtype = arguments[0], _dtype(arguments[6]) if isinstance(arguments[6], Global) else None
    if not isinstance(storage, StorageRef) or dtype is None:
        kind = _describe(arguments[6])
        raise CheckpointError(f"{where}: a tensor of unknown type {kind}", code="pickle_unsupported")
    return _view(storage, dtype, arguments[1:4], arguments[7:8], where)


def _view(
    storage: StorageRef, dtype: str, geometry: tuple[Any, ...], metadata: tuple[Any, ...], where: str
) -> TensorRef:
    offset, shape, strides = geometry
    whole = _is_count(offset) and isinstance(shape, tuple) and isinstance(strides, tuple)
    whole = whole and len(shape) == len(strides) <= _MOST_AXES and all(map(_is_count, (*shape, *strides)))
    if not whole or prod(filter(None, shape)) > _MOST_ELEMENTS:
        raise CheckpointError(f"{where}: a tensor whose shape or strides are not lengths", code="pickle_corrupt")
    flags = metadata[0] if metadata and isinstance(metadata[0], dict) else {}
    lazy = [name for name in ("conj", "neg") if flags.get(name)]
    if lazy:
        raise CheckpointError(
            f"{where}: a tensor of shape {shape} carries a lazy operation ({', '.join(lazy)})",
            code="pickle_unsupported",
            hint="save it after tensor.resolve_conj().resolve_neg()",
        )
    return TensorRef(storage, dtype, offset, shape, strides)


def _parameter(arguments: tuple[Any, ...], where: str) -> TensorRef:
    if not arguments or not isinstance(arguments[0], TensorRef):
        raise CheckpointError(f"{where}: a parameter without a tensor", code="pickle_corrupt")
    return arguments[0]


def _with_state(arguments: tuple[Any, ...], where: str) -> TensorRef:
    """``torch._utils._rebuild_parameter_with_state``: a parameter with attributes, which no file format holds."""
    return _parameter(arguments[:1], where)


def _of_type(arguments: tuple[Any, ...], where: str) -> TensorRef:
    """``torch._tensor._rebuild_from_type_v2``: (function, type, arguments, state) of a tensor with attributes."""
    function, kind, values = arguments[:3]
    if function not in _CALLS or kind not in _TENSOR_TYPES or not isinstance(values, tuple):
        raise CheckpointError(f"{where}: a tensor of the type {_describe(kind)}", code="pickle_unsupported")
    return _parameter((_CALLS[function](values, where),), where)


def _ordered_dict(arguments: tuple[Any, ...], where: str) -> dict[Any, Any]:
    """Empty, to be filled afterwards; Python 2 gave a list of pairs."""
    (content,) = arguments or ((),)
    return _fill({}, content.items() if isinstance(content, dict) else content, where)


def _size(arguments: tuple[Any, ...], where: str) -> tuple[int, ...]:
    if len(arguments) != 1 or not isinstance(arguments[0], (tuple, list)) or not all(map(_is_count, arguments[0])):
        raise CheckpointError(f"{where}: a size that is not a tuple of lengths", code="pickle_corrupt")
    return tuple(arguments[0])


_CALLS: dict[Global, Callable[[tuple[Any, ...], str], Any]] = {
    Global("torch._utils", "_rebuild_tensor"): _tensor,
    Global("torch._utils", "_rebuild_tensor_v2"): _tensor,
    Global("torch._utils", "_rebuild_tensor_v3"): _tensor_v3,
    Global("torch._utils", "_rebuild_parameter"): _parameter,
    Global("torch._utils", "_rebuild_parameter_with_state"): _with_state,
    Global("torch._tensor", "_rebuild_from_type_v2"): _of_type,
    Global("collections", "OrderedDict"): _ordered_dict,
    Global("torch", "Size"): _size,
}

_TENSOR_TYPES = (
    Global("torch", "Tensor"),
    Global("torch._tensor", "Tensor"),
    Global("torch.nn.parameter", "Parameter"),
)

_COPYING = (Global("collections", "OrderedDict"), Global("torch", "Size"))

_ACTIONS: dict[str, Callable[[_Machine, Any], object]] = {
    **dict.fromkeys(("PROTO", "FRAME"), lambda machine, value: None),
    **dict.fromkeys(
        (
            *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
            *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
            *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
        ),
        _Machine.push,
    ),
    "NONE": lambda machine, _: machine.push(None),
    "NEWTRUE": lambda machine, _: machine.push(True),
    "NEWFALSE": lambda machine, _: machine.push(False),
    "MARK": lambda machine, _: machine.push(_MARK),
    "POP": lambda machine, _: machine._stack.pop(),
    "POP_MARK": lambda machine, _: machine.pop_to_mark(),
    "DUP": lambda machine, _: machine.push(machine._stack[-1]),
    "EMPTY_DICT": lambda machine, _: machine.push({}),
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    "EMPTY_TUPLE": lambda machine, _: machine.push(()),
    "DICT": _Machine.make_dict,
    "LIST": lambda machine, _: machine.push(machine.pop_to_mark()),
    "TUPLE": lambda machine, _: machine.push(tuple(machine.pop_to_mark())),
    "TUPLE1": lambda machine, _: machine.tuple_of(1),
    "TUPLE2": lambda machine, _: machine.tuple_of(2),
    "TUPLE3": lambda machine, _: machine.tuple_of(3),
    "SETITEM": lambda machine, _: machine.set_items([machine.pop(), machine.pop()][::-1]),
    "SETITEMS": lambda machine, _: machine.set_items(machine.pop_to_mark()),
    "APPEND": lambda machine, _: machine.append_items([machine.pop()]),
    "APPENDS": lambda machine, _: machine.append_items(machine.pop_to_mark()),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), _Machine.put),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _Machine.get),
    "MEMOIZE": _Machine.memoize,
    "GLOBAL": _Machine.find_global,
    "STACK_GLOBAL": _Machine.find_stacked_global,
    "BINPERSID": _Machine.persistent,
    "REDUCE": _Machine.reduce,
    "NEWOBJ": lambda machine, _: machine.new_object(1),
    "NEWOBJ_EX": lambda machine, _: machine.new_object(2),
    "OBJ": _Machine.object_from_mark,
    "INST": _Machine.instance,
    "EMPTY_SET": lambda machine, _: machine.push(machine.make_opaque("builtins.set")),
    "ADDITEMS": lambda machine, _: machine.append_items(machine.pop_to_mark()),
    "FROZENSET": lambda machine, _: machine.push(machine.make_opaque("builtins.frozenset", machine.pop_to_mark())),
    "BUILD": _Machine.build,
}
