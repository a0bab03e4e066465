"""Commands with odd arguments and damaged files answer or refuse, in one message: a short run of the benchmark."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from port_kit.cli import main


@pytest.fixture(scope="module")
def script() -> Iterator[Any]:
    """The module of the benchmark, imported as its siblings do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
        import fuzz_cli

        yield fuzz_cli


def test_commands_answer_or_refuse(script: Any) -> None:
    heavy = {*script.HEAVY, "plan show"}  # it imports torch
    result = script.fuzz(100, 3, patience=20, memory=2048, only=lambda words: words not in heavy)
    assert not result["findings"], result["findings"]
    assert result["commands"] > 15 and all(result["outcomes"].get(f"exit {code}", 0) > 5 for code in (0, 1, 2)), result


@pytest.mark.parametrize(
    ("body", "part"),
    [
        (lambda: int("x"), "ValueError"),
        (lambda: exit(3), "exit code 3"),
        (lambda: click.echo("a\x1b[2J", color=True), "terminal"),
        (lambda: click.echo("Traceback (most recent call last)", err=True), "a traceback"),
        (lambda: click.echo("x" * 20_000, err=True), "20001 characters"),
        (lambda: exit(1), "no message"),
        (lambda: (click.echo("Error: a\nError: b", err=True), exit(1)), "2 messages"),
        (lambda: exit(2), "0 messages"),
        (lambda: None, ""),
    ],
)
def test_a_wrong_end_is_found(script: Any, body: Any, part: str) -> None:
    problem = script.problem_of(CliRunner().invoke(click.command()(body)))
    assert part in problem and bool(problem) == bool(part)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["list", "--\x1b[2J\u202e"], r"--\x1b[2J\u202e"),
        (["\x1b[2J"], r"'\x1b[2J'"),
        (["hub", "folder", "--port", "9" * 100_000], "..."),
        (["manifest", "a\0b"], "NUL"),
        (["layout", "ring999999"], "at most 4096"),
        (["list", "x" * 100_000], "..."),
    ],
)
def test_wrong_usage_is_told_in_a_short_printable_message(arguments: list[str], part: str) -> None:
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2 and part in result.stderr and len(result.stderr) < 1000
    assert result.stderr.replace("\n", "").isprintable(), result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["hub", "x" * 300],
        ["remove", "x" * 300],
        ["layout", "tp2", "--svg", "."],
        ["rules", "check", "--rules", "/dev/zero"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_an_unusable_path_is_an_error_with_a_code(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1 and "error [" in result.stderr and " cannot be " in result.stderr, result.stderr
    assert len(result.stderr) < 1000
