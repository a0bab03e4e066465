"""Fixtures of the inspection tests: folders and loopback repositories of tiny models."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from port_kit.inspect import Inspection, inspect
from port_kit.testing.hub import Hub
from tests.inspect.fake_repositories import Files, write
from tests.inspect.types import Folder, Remote


@pytest.fixture(autouse=True)
def no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the tests independent of the environment's token."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setenv("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """Write files into a folder whose name contains none of vLLM-Omni's keys."""
    return lambda files: write(files, tmp_path / "some_model")


@pytest.fixture
def remote() -> Iterator[Remote]:
    """Serve files as ``org/some_model`` and inspect that; keywords go to the Hub, ``asked`` to ``inspect``."""
    hubs: list[Hub] = []

    def serve(files: Files, *, asked: dict[str, Any] | None = None, **options: Any) -> Inspection:
        hub = Hub({"org/some_model": files}, **options).start()
        hubs.append(hub)
        return inspect("org/some_model", **{"endpoint": hub.endpoint, "token": False, **(asked or {})})

    serve.hubs = hubs  # type: ignore[attr-defined]
    yield serve
    for hub in hubs:
        hub.stop()
