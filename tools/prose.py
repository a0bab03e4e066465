"""Prose rules that a linter can check: beginnings of docstrings, and subjects of commits.

``prose.py FILE...`` checks the docstrings of Python files. ``prose.py --message FILE`` checks a commit message, and
``prose.py --commits RANGE`` the subjects of a range of commits. The standard library is enough to run it.
"""

from __future__ import annotations

import argparse
import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

#: A docstring is a noun phrase for a module or class, and an imperative for a function.
CLAUSE = re.compile(r"\s*(What|Which|Where|How|Whether)\b")
SUBJECT_LENGTH = 72
SUBJECT = re.compile(r"(Merge|Revert|fixup!|squash!) |[a-z][\w./-]*: \S")

_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def docstring_problems(path: Path) -> Iterator[str]:
    """Yield a line for each docstring that starts with an interrogative."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, _Documented):
            continue
        found = CLAUSE.match(ast.get_docstring(node) or "")
        if found:
            line = node.body[0].lineno
            yield f"{path}:{line}: docstring starts with {found[1]!r}; write a noun phrase or an imperative"


def subject_problems(subject: str) -> Iterator[str]:
    """Yield a line for each rule that the subject of a commit breaks."""
    if len(subject) > SUBJECT_LENGTH:
        yield f"subject has {len(subject)} characters, at most {SUBJECT_LENGTH} are allowed: {subject}"
    if not SUBJECT.match(subject):
        yield f"subject has no area prefix, such as 'remap: compile the plan once': {subject}"
    if subject.endswith("."):
        yield f"subject ends with a period: {subject}"


def problems(arguments: argparse.Namespace) -> Iterator[str]:
    """Yield the problems of all that the command line names."""
    for path in arguments.files:
        yield from docstring_problems(path)
    if arguments.message:
        lines = arguments.message.read_text(encoding="utf-8").splitlines()
        yield from subject_problems(next((line for line in lines if line and not line.startswith("#")), ""))
    if arguments.commits:
        command = ["git", "log", "--no-merges", "--format=%s", arguments.commits]
        for subject in subprocess.check_output(command, text=True).splitlines():
            yield from subject_problems(subject)


def main() -> int:
    """Print all problems; return the exit status."""
    parser = argparse.ArgumentParser(description="Check docstrings and commit subjects.")
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--message", type=Path)
    parser.add_argument("--commits", metavar="RANGE")
    found = list(problems(parser.parse_args()))
    print("\n".join(found), end="\n" if found else "", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
