"""A pickle interpreter that executes no code.

The opcodes are decoded by :mod:`pickletools`, which only reads. Here they build dicts, lists, tuples, numbers and
strings; a global is a pair of names, never an imported object. Calling one that is on the allow list builds a
:class:`StorageRef` or a :class:`TensorRef`, which are records of offsets and shapes. Any other global becomes an
:class:`Opaque` value, which records its arguments. The allow list applies to kept values: the
reader of the result rejects opaque values there, and leaves out the rest. An opaque value that is not in the result is
rejected at once. Memory is bounded by the pickle's length.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from typing import Any, BinaryIO

from port_kit.checkpoint.byte_sources import CachedSource
from port_kit.checkpoint.pickle_values import (
    CALLS,
    COPYING,
    Global,
    Opaque,
    build_storage,
    corrupt,
    describe,
    fill,
    is_allowed,
    refuse_opaque,
    unsafe,
    unsupported,
    values_below,
)
from port_kit.errors import CheckpointError
from port_kit.escape import reason_of

LONGEST_PICKLE = 1 << 28
_MOST_OPCODES = 50_000_000
_LARGEST_MEMO = 1 << 32
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


class _Mark:
    """The begin of a group of stack items."""


_MARK = _Mark()


def read_pickle(stream: BinaryIO | CachedSource, where: str, *, allow_opaque: bool = False) -> Any:
    """Return the value of the pickle at the stream's position; the stream is then positioned behind it.

    Args:
        stream: a seekable binary file.
        where: name for messages.
        allow_opaque: the result may hold :class:`Opaque` values below its root; the caller leaves them out.

    Raises:
        CheckpointError: ``pickle_unsafe`` for a global or an action that is not on the allow list,
            ``pickle_unsupported`` for tensors that have no plain form, ``pickle_corrupt`` for anything unreadable.
    """
    machine = _Machine(where, allow_opaque)
    start = stream.tell()
    try:
        for count, (opcode, argument, position) in enumerate(pickletools.genops(stream)):  # type: ignore[arg-type]
            if count > _MOST_OPCODES or (position or 0) - start > LONGEST_PICKLE:
                raise corrupt(f"{where}: the pickle is longer than any checkpoint's")
            if opcode.name == "STOP":
                return machine.result()
            machine.step(opcode.name, argument, position or 0)
    except (ValueError, IndexError, KeyError, TypeError, EOFError, OverflowError, MemoryError) as error:
        reason = f"{type(error).__name__}: {reason_of(error)}"
        raise corrupt(f"{where}: the pickle cannot be read ({reason})") from error
    raise corrupt(f"{where}: the pickle ends without STOP")


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
            raise unsupported(f"{self._where}: the pickle would take far more memory than its own length")

    def result(self) -> Any:
        """Return the value on the stack, once every opaque value has been found in it."""
        root = self.pop()
        if self._opaque:
            if isinstance(root, Opaque):
                refuse_opaque(root, self._where)
            found = {id(value) for value in values_below(root) if isinstance(value, Opaque)}
            for value in self._opaque:
                if id(value) not in found:
                    raise unsafe(self._where, f"the global {value.name}", value.name)
        return root

    def make_opaque(self, name: str, *parts: Any) -> Opaque:
        """Note a value that is not built."""
        if not self._allow_opaque:
            raise unsafe(self._where, f"the global {name}", name)
        value = Opaque(name, *parts)
        self._opaque.append(value)
        return value

    def pop(self) -> Any:
        value = self._stack.pop()
        if value is _MARK:
            raise ValueError("a mark where a value is needed")
        return value

    def pop_many(self, count: int) -> list[Any]:
        """Take as many values off the stack; the topmost is the last one."""
        return [self.pop() for _ in range(count)][::-1]

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
            raise self._refused(f"an update of {describe(self._stack[-1])}")
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
            fill(target, zip(items[::2], items[1::2], strict=True), self._where)

    def append_items(self, items: list[Any]) -> None:
        target = self.top(list)
        (target.parts if isinstance(target, Opaque) else target).extend(items)

    def find_global(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self.push_global(module, name)

    def push_global(self, module: Any, name: Any) -> None:
        if not (isinstance(name, str) and isinstance(module, str)):
            raise self._refused("a global whose name is not text")
        found = Global(module, name)
        self.push(found if is_allowed(found) else self.make_opaque(str(found)))

    def persistent(self, _: None) -> None:
        identity = self.pop()
        unknown = isinstance(identity, tuple) and len(identity) > 1 and isinstance(identity[1], Opaque)
        if unknown:
            self.push(self.make_opaque(f"the storage {identity[1].name}", identity))
        else:
            self.push(build_storage(identity, self._where))

    def call(self, function: Any, *arguments: Any) -> None:
        """Call a global that is on the allow list; note the call of any other one."""
        if isinstance(function, Opaque):
            self.push(self.make_opaque(function.name, function, *arguments))
            return
        if not isinstance(function, Global) or function not in CALLS or not isinstance(arguments[0], tuple):
            raise self._refused(f"a call of {describe(function)}")
        # Each item was spelled out once; more copies than that are there to fill the memory.
        self._copied += sum(map(len, arguments[0])) if function in COPYING else 0
        if self._copied > self._steps:
            raise self._refused("more copies of its own content than it holds items")
        self.push(CALLS[function](arguments[0], self._where))

    def call_class(self, kind: Any, *arguments: Any) -> None:
        """Make an object of a class: none on the allow list is written so."""
        if not isinstance(kind, Opaque):
            raise self._refused(f"an object of {describe(kind)}")
        self.call(kind, *arguments)

    def instance(self, argument: str) -> None:
        arguments = self.pop_to_mark()
        self.find_global(argument)
        self.call_class(self.pop(), *arguments)

    def build(self, _: None) -> None:
        """State that torch keeps beside a dict (``_metadata``) carries no tensors; anything else has no state."""
        state, target = self.pop(), self.top(dict)
        if isinstance(target, Opaque):
            target.parts.append(state)

    def _refused(self, what: str) -> CheckpointError:
        return unsafe(self._where, what, what)


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
    "TUPLE1": lambda machine, _: machine.push(tuple(machine.pop_many(1))),
    "TUPLE2": lambda machine, _: machine.push(tuple(machine.pop_many(2))),
    "TUPLE3": lambda machine, _: machine.push(tuple(machine.pop_many(3))),
    "SETITEM": lambda machine, _: machine.set_items(machine.pop_many(2)),
    "SETITEMS": lambda machine, _: machine.set_items(machine.pop_to_mark()),
    "APPEND": lambda machine, _: machine.append_items([machine.pop()]),
    "APPENDS": lambda machine, _: machine.append_items(machine.pop_to_mark()),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), _Machine.put),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _Machine.get),
    "MEMOIZE": _Machine.memoize,
    "GLOBAL": _Machine.find_global,
    "STACK_GLOBAL": lambda machine, _: machine.push_global(*machine.pop_many(2)),
    "BINPERSID": _Machine.persistent,
    "REDUCE": lambda machine, _: machine.call(*machine.pop_many(2)),
    "NEWOBJ": lambda machine, _: machine.call_class(*machine.pop_many(2)),
    "NEWOBJ_EX": lambda machine, _: machine.call_class(*machine.pop_many(3)),
    "OBJ": lambda machine, _: machine.call_class(*machine.pop_to_mark()),
    "INST": _Machine.instance,
    "EMPTY_SET": lambda machine, _: machine.push(machine.make_opaque("builtins.set")),
    "ADDITEMS": lambda machine, _: machine.append_items(machine.pop_to_mark()),
    "FROZENSET": lambda machine, _: machine.push(machine.make_opaque("builtins.frozenset", machine.pop_to_mark())),
    "BUILD": _Machine.build,
}
