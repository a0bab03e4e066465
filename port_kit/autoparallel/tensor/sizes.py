"""Sizes of any configuration as expressions over the attributes of a block, fitted to several configurations."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from port_kit.errors import ParallelError
from port_kit.escape import quoted

#: Factors that expressions may have.
_FACTORS = (2, 3, 4, 6, 8)
_TOKENS = re.compile(r"//|\*|[\w.]+")


def evaluate(expression: str, block: nn.Module) -> int:
    """Evaluate an expression over the attributes of a block, from left to right.

    Raises:
        ParallelError: ``plan_expression``; an attribute does not exist or is no whole number.
    """
    total, operator = 1, "*"
    for token in _TOKENS.findall(expression):
        if token in ("*", "//"):
            operator = token
            continue
        value = int(token) if token.isdigit() else _attribute(block, token, expression)
        total = total * value if operator == "*" else total // max(value, 1)
    return total


def _attribute(block: nn.Module, path: str, expression: str) -> int:
    value: Any = block
    for name in path.split("."):
        value = getattr(value, name, None)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ParallelError(
            f"Expression {quoted(expression)}: {type(block).__name__} has no whole number {quoted(path)}.",
            code="plan_expression",
            hint="infer the plan from this class: port-kit plan infer CLASS -o FILE",
        )
    return value


def numbers(block: nn.Module) -> dict[str, int]:
    """Return the whole numbers among the attributes of a block's modules and of their plain objects, by path."""
    found: dict[str, int] = {}
    for path, module in block.named_modules():
        for name, value in vars(module).items():
            key = f"{path}.{name}" if path else name
            if is_number(value):
                found[key] = value
            elif is_plain_object(value):
                found.update({f"{key}.{n}": v for n, v in vars(value).items() if is_number(v)})
    return {key: value for key, value in found.items() if "._" not in f".{key}"}


def is_number(value: Any) -> bool:
    """Return True for a whole number above one."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 1


def is_plain_object(value: Any) -> bool:
    """Return True for instances such as attention processors: neither modules, functions nor configurations."""
    if not hasattr(value, "__dict__") or hasattr(value, "__get__"):
        return False
    return not isinstance(value, (type, nn.Module, Mapping))


def fit(sizes: Sequence[int], tables: Sequence[Mapping[str, int]], near: str) -> list[str]:
    """Return the expressions that give a size in every configuration, the simplest first.

    Args:
        sizes: the size in each configuration.
        tables: :func:`numbers` of the block in each configuration.
        near: path of a module; attributes of modules with a longer common path come first.
    """
    names = sorted(set.intersection(*(set(table) for table in tables)), key=lambda name: _distance(name, near))
    columns = {name: [table[name] for table in tables] for name in names}
    heads = {name: values for name, values in columns.items() if "head" in name.rpartition(".")[2]}
    plain = [name for name, values in columns.items() if values == list(sizes)]
    found = [
        *plain,
        *_products(list(sizes), heads),
        *_multiples(list(sizes), columns),
        *_products(list(sizes), columns),
    ]
    return list(dict.fromkeys(found))


def _distance(name: str, near: str) -> tuple[int, int, int, int, str]:
    parts, wanted = name.split(".")[:-1], near.split(".")
    common = next(
        (i for i, (a, b) in enumerate(zip(parts, wanted, strict=False)) if a != b), min(len(parts), len(wanted))
    )
    # sizes that a class names are more specific than the widths of its linears
    leaf = name.rpartition(".")[2]
    rank = 0 if "head" in leaf else 1 if "inner" in leaf else 3 if leaf in ("in_features", "out_features") else 2
    return rank // 3, len(parts) + len(wanted) - 2 * common, rank, len(name), name


def _multiples(sizes: list[int], columns: Mapping[str, list[int]]) -> Iterator[str]:
    for factor in _FACTORS:
        yield from (f"{name}*{factor}" for name, values in columns.items() if [v * factor for v in values] == sizes)
        for name, values in columns.items():
            if not any(v % factor for v in values) and [v // factor for v in values] == sizes:
                yield f"{name}//{factor}"


def _products(sizes: list[int], columns: Mapping[str, list[int]]) -> Iterator[str]:
    names = list(columns)
    for at, one in enumerate(names):
        for other in names[at + 1 :]:
            if [a * b for a, b in zip(columns[one], columns[other], strict=True)] == sizes:
                yield f"{one}*{other}"
    for one in names:
        for other in names:
            quotients = [(a // b, a % b) for a, b in zip(columns[one], columns[other], strict=True)]
            if quotients == [(size, 0) for size in sizes]:
                yield f"{one}//{other}"
