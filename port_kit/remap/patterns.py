"""Texts of rules: source patterns, target templates, and sizes as arithmetic.

A pattern matches a complete name. A pattern whose matching time is not bounded is refused when a rule is made, so that
no tensor name can stall a load. A size is parsed into a syntax tree, and never evaluated as Python.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from port_kit.errors import RemapError
from port_kit.escape import quoted, reason_of
from port_kit.remap.matching_time import UnboundedError, check_matching_time, parse_pattern
from port_kit.remap.names import NUMBER, fill, template_of

MAX_PATTERN_LENGTH = 600
#: Longest tensor name that is matched; together with the length of chains it bounds the matching time.
MAX_NAME_LENGTH = 256


@lru_cache(maxsize=8192)
def compile_pattern(pattern: str) -> re.Pattern[str]:
    """Compile a source pattern.

    Raises:
        RemapError: ``remap_pattern`` if it is no regular expression or its matching time is not bounded.
    """
    if len(pattern) > MAX_PATTERN_LENGTH:
        raise _bad(pattern, f"is longer than {MAX_PATTERN_LENGTH} characters")
    try:
        compiled, tree = re.compile(pattern), parse_pattern(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise _bad(pattern, f"is not a regular expression: {reason_of(error)}") from error
    if compiled.flags != re.compile("").flags:
        raise _bad(pattern, "sets flags")
    try:
        check_matching_time(tree)
    except UnboundedError as error:
        raise _bad(pattern, str(error)) from error
    return compiled


def _bad(pattern: str, why: str) -> RemapError:
    hint = r"write names out and use (\d+), ([^.]+) and (a|b) for parts that vary"
    return RemapError(f"pattern {quoted(pattern)} {why}", code="remap_pattern", hint=hint)


_TEMPLATE_PART = re.compile(r"\\(\d{1,2})|\\g<(\w+)>|\{([^{}]*)\}|\\([\\{}])|(\\.?|[{}])", re.DOTALL)


@dataclass(frozen=True)
class Template:
    """A target name with placeholders; its parts are text, ``("group", name)`` or ``("size", expression)``."""

    parts: tuple[str | tuple[str, str], ...]

    @cached_property
    def format(self) -> tuple[str, tuple[int | str, ...]] | None:
        """A ``%`` format and the groups that fill it, or None if the template has expressions."""
        if any(part[0] == "size" for part in self.parts if not isinstance(part, str)):
            return None
        text = "".join(part.replace("%", "%%") if isinstance(part, str) else "%s" for part in self.parts)
        return text, tuple(int(group) if group.isdigit() else group for group in self.groups())

    def groups(self) -> list[str]:
        """Return the groups that the template refers to, numbers as digits."""
        return [part[1] for part in self.parts if not isinstance(part, str) and part[0] == "group"]


@lru_cache(maxsize=8192)
def parse_template(text: str) -> Template:
    r"""Parse a template: ``\1``, ``\g<name>`` and ``{expression}``; ``\\``, ``\{`` and ``\}`` stand for themselves.

    Raises:
        RemapError: ``remap_template`` for a stray backslash or brace, ``remap_size`` for an expression.
    """
    parts: list[str | tuple[str, str]] = []
    at = 0
    for match in _TEMPLATE_PART.finditer(text):
        number, name, expression, sign, stray = match.groups()
        if stray:
            hint = r"a template is plain text with \1, \g<name> and {expression}"
            raise RemapError(f"template {quoted(text)} has a stray {quoted(stray)}", code="remap_template", hint=hint)
        if match.start() > at:
            parts.append(text[at : match.start()])
        if expression is not None:
            parse_size(expression)
        parts.append(sign or (("size", expression) if expression is not None else ("group", number or name)))
        at = match.end()
    if at < len(text):
        parts.append(text[at:])
    return Template(tuple(parts))


def literal_template(text: str) -> str:
    """Return the template that yields exactly this text."""
    return re.sub(r"[\\{}]", r"\\\g<0>", text)


def generalize_names(names: Sequence[str], texts: Sequence[Sequence[str]]) -> tuple[str, list[str]] | None:
    r"""Return one pattern for names that differ only in numbers, and one template for each of their texts.

    A number that differs between the names is a group of the pattern.

    Args:
        names: names of one layer template.
        texts: for each name the same count of texts, such as target names; those at one position differ only in
            numbers.

    Returns:
        The pattern and the templates; None if a number that differs between texts is not in the names.
    """
    columns = list(zip(*map(NUMBER.findall, names), strict=True))
    varying = [column for column in columns if len(set(column)) > 1]
    numbers = [r"(\d+)" if column in varying else column[0] for column in columns]
    pattern = fill(re.escape(template_of(names[0])).replace(r"\#", "#"), numbers)
    templates = []
    for alike in zip(*texts, strict=True):
        columns = list(zip(*map(NUMBER.findall, alike), strict=True))
        if any(column not in varying and len(set(column)) > 1 for column in columns):
            return None
        numbers = [rf"\{varying.index(column) + 1}" if column in varying else column[0] for column in columns]
        templates.append(fill(literal_template(template_of(alike[0])), numbers))
    return pattern, templates


#: Longest accepted expression; real ones have a dozen characters.
MAX_EXPRESSION_LENGTH = 200
#: Largest intermediate value; no tensor has an extent near it.
MAX_VALUE = 1 << 48

_OPERATORS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_GROUP_NAME = re.compile(r"\\(\d{1,2})|\\g<(\w+)>")
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
        return _value(parse_size(expression), names)
    except KeyError as error:
        known = ", ".join(sorted(names)) or "none"
        hint = f"known sizes: {known}; give it in the rule set's sizes or to compile(sizes=...)"
        raise _bad_size(expression, f"{of}names {quoted(error.args[0])}, which is not a known size", hint) from error
    except (ZeroDivisionError, OverflowError) as error:
        hint = "check the named sizes that it uses"
        raise _bad_size(expression, f"{of}cannot be computed: {reason_of(error)}", hint) from error


def evaluate_sizes(sizes: Mapping[str, int | str], given: Mapping[str, int]) -> dict[str, int]:
    """Resolve named sizes that are expressions over each other; ``given`` adds and overrides.

    Raises:
        RemapError: ``remap_size`` for an unknown name or sizes that define each other.
    """
    values: dict[str, int] = {**{k: v for k, v in sizes.items() if isinstance(v, int)}, **given}
    waiting = {name: text for name, text in sizes.items() if name not in values and isinstance(text, str)}
    while waiting:
        ready = [name for name, text in waiting.items() if not _names_in(text) & waiting.keys()]
        if not ready:
            raise _bad_size(", ".join(waiting), "define each other", "give one of them as a number")
        for name in ready:
            values[name] = evaluate(waiting.pop(name), values, f"size {name}")
    return values


def _names_in(expression: str) -> set[str]:
    return {node.id for node in ast.walk(parse_size(expression)) if isinstance(node, ast.Name)}


@lru_cache(maxsize=4096)
def parse_size(expression: str) -> ast.expr:
    r"""Parse an expression; raises ``remap_size`` for anything but integer arithmetic.

    Groups are read as names: ``\1 // 4`` as ``_1 // 4``, ``\g<n>`` as ``n``.
    """
    if len(expression) > MAX_EXPRESSION_LENGTH:
        raise _bad_size(expression, f"is longer than {MAX_EXPRESSION_LENGTH} characters")
    try:
        text = _GROUP_NAME.sub(lambda group: f"_{group[1]}" if group[1] else group[2], expression.strip())
        tree = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise _bad_size(expression, "cannot be read") from error
    for node in ast.walk(tree):
        if not isinstance(node, _ALLOWED):
            raise _bad_size(expression, f"uses {type(node).__name__}")
        if isinstance(node, ast.Constant) and type(node.value) is not int:
            raise _bad_size(expression, f"uses the constant {quoted(node.value)}")
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


def _bad_size(expression: str, why: str, hint: str = "") -> RemapError:
    hint = hint or "a size is integers, names, brackets and + - * // %, such as 3*hidden + mlp"
    return RemapError(f"size {quoted(expression)} {why}", code="remap_size", hint=hint, expression=expression)
