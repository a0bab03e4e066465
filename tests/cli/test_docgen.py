"""The generated pages agree with the code, and the table of error codes with the raised errors."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from port_kit.cli import COMMANDS
from port_kit.docgen.__main__ import PAGES
from port_kit.docgen.commands import cli_page
from port_kit.docgen.errors import used_codes
from port_kit.errors import CODES

#: Each page is built once for all tests.
BUILT = {name: cache(build) for name, build in PAGES.items()}
DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize(("name", "build"), BUILT.items())
def test_committed_page_is_up_to_date(name: str, build: Callable[[], str]) -> None:
    committed = (DOCS / name).read_text(encoding="utf-8")
    assert committed == build(), f"docs/{name} is out of date: run python -m port_kit.docgen and commit it"


def test_every_command_has_its_section_and_two_examples() -> None:
    sections = dict(section.split("\n", 1) for section in cli_page().split("\n## ")[1:])
    assert {title.split()[1] for title in sections if title != "port-kit"} == set(COMMANDS)
    for title, text in sections.items():
        if "COMMAND [ARGS]" not in text:
            assert text.count(f"\n{title} ") >= 2, f"{title} has a usage line and two examples"
            assert text.count("\nport-kit ") >= 3, f"{title} has a usage line and two examples"


def test_every_code_has_its_place_and_its_meaning() -> None:
    page = BUILT["troubleshooting.md"]()
    for code, meaning in CODES.items():
        assert f"### `{code}`" in page and meaning[1:] in page


def test_every_code_is_raised_somewhere() -> None:
    composed = {f"hub_{kind}_missing" for kind in ("file", "repo", "revision")}
    assert set(CODES) - used_codes() - composed == set()
