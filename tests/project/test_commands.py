"""Commands of README.md and of the examples' pages: program and options exist, and a test names the program."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

from port_kit.cli import COMMANDS, main

ROOT = Path(__file__).parents[2]
FOLDERS = ("docs/ports", "recipes")
PAGES = [ROOT / "README.md", *sorted((ROOT / "examples").rglob("README.md"))]
PAGES += sorted(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md"))
TESTS = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py") if path != Path(__file__))
#: Commands of the shell and of installations, which set-up and the continuous integration run.
SHELL = ("cd", "export", ".", "pip", "make", "pytest", "git")


def commands(page: Path) -> list[list[str]]:
    """Return the words of each command in the boxes of a page; prose and output are left out."""
    found = []
    text = re.sub(r"\\\n\s*", " ", page.read_text(encoding="utf-8"))
    for line in re.findall(r"(?:^|\n)    (\S.*)", text):
        words = shlex.split(line.partition("  #")[0].replace("'", '"') if line.count("'") % 2 else line.split("  #")[0])
        if words and (
            words[0] in (*SHELL, "port-kit", "vllm", "sh", "curl", "python") or words[0].endswith((".py", ".sh"))
        ):
            found.append(words)
    return found


CASES = [pytest.param(words, id=" ".join(words)[:60]) for page in PAGES for words in commands(page)]


def test_pages_have_commands() -> None:
    assert len(CASES) > 40


@pytest.mark.parametrize("words", CASES)
def test_a_command_exists_and_a_test_names_it(words: list[str]) -> None:
    program = words[0].rpartition("/")[2]
    scripts = [word.rpartition("/")[2] for word in words if word.endswith((".py", ".sh"))]
    if program == "vllm":
        assert f'"{words[1]}"' in TESTS, f"no test names vllm {words[1]}"
    elif program == "port-kit":
        assert words[1] in COMMANDS
        options = [word for word in words[2:] if word.startswith("--")]
        check_options(words[1], options)
        assert f'"{words[1]}"' in TESTS, f"no test names port-kit {words[1]}"
    elif scripts and program not in ("cd", "export"):
        if any(word.startswith("benchmarks/") for word in words):  # their results are recorded in benchmarks/results
            assert (ROOT / "benchmarks" / scripts[0]).is_file()
            return
        path = next((ROOT / "examples").rglob(scripts[0]), None)
        assert path is not None, f"{scripts[0]} does not exist"
        assert "worked_ports" in str(path) or scripts[0] in TESTS, f"no test names {scripts[0]}"
    elif program == "make":
        target = next(word for word in words[1:] if "=" not in word)
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)


def check_options(name: str, options: list[str]) -> None:
    """Require that a command has the options, unless it passes unknown ones on."""
    context = click.Context(main)
    command = main.get_command(context, name)
    while isinstance(command, click.Group):  # a group has options only in its commands
        return
    assert command is not None
    if command.context_settings.get("ignore_unknown_options"):
        return
    known = {option for parameter in command.params for option in parameter.opts}
    assert not [option for option in options if option not in known], options
