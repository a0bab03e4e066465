"""Pages of Ovi: with a server on the tiny model, without one, and with a wrong key; as a user starts them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from port_kit.testing.server import free_port
from tests.page.browser import ServedPage, browser, served_page
from tests.serving.helpers import download_as_written

KEY = "page-key"
#: Seconds until a page with a server answers: importing vLLM alone takes many on a busy machine.
LOAD = 400.0


class Pages(NamedTuple):
    """The pages, and the addresses of their servers."""

    own: ServedPage
    server: str
    lost: ServedPage
    nowhere: str
    wrong_key: ServedPage


@pytest.fixture(scope="session")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pages]:
    """Start all pages, those without a server of their own while others are waited for or tested."""
    folder, nowhere = tmp_path_factory.mktemp("own"), f"http://127.0.0.1:{free_port()}"
    model, options = download_as_written("ovi", folder)
    with ExitStack() as stack:

        def start(*line: str, place: Path, **more: str) -> ServedPage:
            return stack.enter_context(served_page("ovi", *line, folder=place, **more))

        # as in the guide, a relative path
        own = start(model.name, *options, place=folder, key=KEY, script="run_gradio_demo.sh")
        lost = start("--url", nowhere, place=tmp_path_factory.mktemp("lost"))
        own.wait(LOAD)
        found = re.search(r"its server at (\S+)\. Ctrl-C", own.text())
        assert found is not None, own.text()
        wrong_key = start("--url", found[1], place=tmp_path_factory.mktemp("key"), key="another")
        yield Pages(own, found[1], lost, nowhere, wrong_key)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{found[1]}/health", trust_env=False)


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """A browser."""
    with browser() as started:
        yield started


@pytest.fixture
def page(chromium: Any, pages: Pages) -> Iterator[Any]:
    """The open page with a server."""
    opened = chromium.new_page(viewport={"width": 1320, "height": 1000})
    opened.goto(pages.own.url)
    opened.locator("#pk-generate").wait_for()
    yield opened
    opened.close()
