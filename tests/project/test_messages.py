"""Messages repeat values of users, files and other libraries only in a printable form of limited length."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from tests.project.test_project import ROOT, _files

#: Functions whose text is no message of an error: (file, function).
PLAIN = {
    ("port_kit/cli/generate.py", "build_parser"),
    ("port_kit/download/__init__.py", "__getattr__"),
    ("port_kit/manifest.py", "__repr__"),
}
FILES = _files("port_kit", "models")
TREES = {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in FILES}


def _parts(tree: ast.AST, function: str = "") -> Iterator[tuple[str, ast.FormattedValue]]:
    """Yield the values that f-strings format, with the function that they are in."""
    for node in ast.iter_child_nodes(tree):
        inside = node.name if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) else function
        if isinstance(node, ast.FormattedValue):
            yield inside, node
        yield from _parts(node, inside)


def _is_call(node: ast.AST, *names: str) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names


def test_values_are_quoted_by_one_function() -> None:
    found = [
        f"{path}:{part.lineno} {ast.unparse(part)}: use port_kit.escape.quoted"
        for path, tree in TREES.items()
        for function, part in _parts(tree)
        if (part.conversion in (ord("r"), ord("a")) or _is_call(part.value, "repr")) and (path, function) not in PLAIN
    ]
    assert not found, "\n".join(found)


def _own_exceptions() -> set[str]:
    """Names of the classes of the kit: their messages are its own."""
    return {node.name for tree in TREES.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}


def _caught(handler: ast.ExceptHandler) -> set[str]:
    kinds = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return {ast.unparse(kind).rpartition(".")[2] for kind in kinds if kind is not None}


def test_messages_of_other_libraries_are_shortened() -> None:
    found, own = [], _own_exceptions()
    for path, tree in TREES.items():
        for handler in ast.walk(tree):
            if not isinstance(handler, ast.ExceptHandler) or handler.name is None or _caught(handler) <= own:
                continue
            raised = [node.exc for node in ast.walk(handler) if isinstance(node, ast.Raise) and node.exc is not None]
            texts = [node for each in raised for node in ast.walk(each) if _is_call(node, "str")]
            for part in [*texts, *(part.value for _, part in _parts(handler))]:
                value = part.args[0] if _is_call(part, "str") else part
                if isinstance(value, ast.Name) and value.id == handler.name:
                    found.append(f"{path}:{part.lineno} {ast.unparse(part)}: use port_kit.escape.reason_of")
    assert len(own) > 100 and not found, "\n".join(found)


def test_the_rules_see_a_message() -> None:
    code = "def f(x):\n try: pass\n except (OSError, m.InputError) as error: raise E(f'{x!r} {str(error)}')"
    parts = [(function, ast.unparse(part)) for function, part in _parts(ast.parse(code))]
    handler = next(node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.ExceptHandler))
    assert [function for function, _ in parts] == ["f", "f"] and _caught(handler) == {"OSError", "InputError"}
