"""A server of the tiny Ovi and its page, started as a user starts them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from port_kit.testing.server import ApiServer
from tests.page.browser import browser, served_page
from tests.serving.helpers import serving

KEY = "page-key"


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    """The server of Ovi, with an API key."""
    with serving("ovi", tmp_path_factory.mktemp("ovi"), "--api-key", KEY) as running:
        yield running


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """A browser."""
    with browser() as started:
        yield started


@pytest.fixture(scope="session")
def address(server: ApiServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of the page of Ovi."""
    with served_page("ovi", "--url", server.url, folder=tmp_path_factory.mktemp("page"), key=KEY) as url:
        yield url


@pytest.fixture
def page(chromium: Any, address: str, tmp_path: Path) -> Iterator[Any]:
    """The open page."""
    opened = chromium.new_page(viewport={"width": 1320, "height": 1000})
    opened.goto(address)
    opened.locator("#pk-generate").wait_for()
    yield opened
    opened.close()
