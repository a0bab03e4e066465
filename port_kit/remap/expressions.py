"""Sizes as integer arithmetic over named sizes: parsed into a syntax tree, never evaluated as Python."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping
from functools import lru_cache

from port_kit.errors import RemapError

#: Longest accepted expression; real ones have a dozen characters.
MAX_LENGTH = 200
#: Largest intermediate value; no tensor has an extent near it.
MAX_VALUE = 1 << 48

_OPERATORS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_GROUP = re.compile(r"\\(\d{1,2})|\\g<(\w+)>")
_ALLOWED = (ast.BinOp, ast.UnaryOp, ast.USub, ast.Constant, ast.Name, ast.Load, *_OPERATORS)


def evaluate(expression: int | str, names: Mapping[str, int], where: str = "") -> int:
    """Return the integer value of an expression such as ``"3*hidden + mlp"``.

    Args:
        expression: an integer, or text over ``+ - * // %``, brackets, integers and names.
        names, where: the named sizes and numeric groups; the owner of the expression, for the message.

    Raises:
        RemapError: ``remap_size`` for anything that is not such an expression or names an unknown size.
    """
    if isinstance(expression, int):
        return expression
    of = f"of {where} " if where else ""
    try:
        return _value(parse(expression), names)
    except KeyError as error:
        known = ", ".join(sorted(names)) or "none"
        hint = f"known sizes: {known}; give it in the rule set's sizes or to compile(sizes=...)"
        raise _bad(expression, f"{of}names {error.args[0]!r}, which is not a known size", hint) from error
    except (ZeroDivisionError, OverflowError) as error:
        hint = "check the named sizes that it uses"
        raise _bad(expression, f"{of}cannot be computed: {error}", hint) from error


def evaluate_sizes(sizes: Mapping[str, int | str], given: Mapping[str, int]) -> dict[str, int]:
    """Resolve named sizes that are expressions over each other; ``given`` adds and overrides.

    Raises:
        RemapError: ``remap_size`` for an unknown name or sizes that define each other.
    """
    values: dict[str, int] = {**{k: v for k, v in sizes.items() if isinstance(v, int)}, **given}
    waiting = {name: text for name, text in sizes.items() if name not in values and isinstance(text, str)}
    while waiting:
        ready = [name for name, text in waiting.items() if not _names(text) & waiting.keys()]
        if not ready:
            raise _bad(", ".join(waiting), "define each other", "give one of them as a number")
        for name in ready:
            values[name] = evaluate(waiting.pop(name), values, f"size {name}")
    return values


def _names(expression: str) -> set[str]:
    return {node.id for node in ast.walk(parse(expression)) if isinstance(node, ast.Name)}


@lru_cache(maxsize=4096)
def parse(expression: str) -> ast.expr:
    r"""Parse an expression; raises ``remap_size`` for anything but integer arithmetic.

    Groups are read as names: ``\1 // 4`` as ``_1 // 4``, ``\g<n>`` as ``n``.
    """
    if len(expression) > MAX_LENGTH:
        raise _bad(f"{expression[:40]}...", f"is longer than {MAX_LENGTH} characters")
    try:
        text = _GROUP.sub(lambda group: f"_{group[1]}" if group[1] else group[2], expression.strip())
        tree = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise _bad(expression, "cannot be read") from error
    for node in ast.walk(tree):
        if not isinstance(node, _ALLOWED):
            raise _bad(expression, f"uses {type(node).__name__}")
        if isinstance(node, ast.Constant) and type(node.value) is not int:
            raise _bad(expression, f"uses the constant {node.value!r}")
    return tree


def _value(node: ast.expr, names: Mapping[str, int]) -> int:
    if isinstance(node, ast.Constant):
        result = node.value
    elif isinstance(node, ast.Name):
        result = names[node.id]
    elif isinstance(node, ast.UnaryOp):
        result = -_value(node.operand, names)
    else:
        assert isinstance(node, ast.BinOp)
        result = _OPERATORS[type(node.op)](_value(node.left, names), _value(node.right, names))
    assert isinstance(result, int)
    if abs(result) > MAX_VALUE:
        raise OverflowError("a value is larger than any tensor")
    return result


def _bad(expression: str, why: str, hint: str = "") -> RemapError:
    hint = hint or "a size is integers, names, brackets and + - * // %, such as 3*hidden + mlp"
    return RemapError(f"size {expression!r} {why}", code="remap_size", hint=hint, expression=expression)
