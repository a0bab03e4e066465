"""The prose rules of ``tools/prose.py``."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "prose.py"


@pytest.fixture(scope="module")
def prose() -> ModuleType:
    """The tool as a module."""
    spec = importlib.util.spec_from_file_location("prose", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ('"""What is kept."""\n', [1]),
        ('"""Kept tensors."""\n\n\ndef f():\n    """\n    Whether it fits."""\n', [5]),
        ('"""Whatever."""\n\n\nclass A:\n    """Howitzer."""\n', []),
        ('x = "How"\n', []),
    ],
)
def test_a_docstring_that_starts_with_an_interrogative_is_reported(
    prose: ModuleType, tmp_path: Path, text: str, lines: list[int]
) -> None:
    path = tmp_path / "module.py"
    path.write_text(text)
    assert [int(problem.split(":")[1]) for problem in prose.docstring_problems(path)] == lines


@pytest.mark.parametrize(
    ("subject", "count"),
    [
        ("remap: compile the plan once", 0),
        ("Merge branch 'main'", 0),
        ("Compile the plan once", 1),
        ("remap: compile the plan once.", 1),
        (f"remap: {'x' * 66}", 1),
        (f"remap: {'x' * 65}", 0),
    ],
)
def test_subjects_have_a_prefix_and_a_length(prose: ModuleType, subject: str, count: int) -> None:
    assert len(list(prose.subject_problems(subject))) == count
