"""A headless Chromium on a page, and the page as a user starts it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from port_kit.testing.server import free_port
from tests.serving.helpers import EXAMPLES

#: Seconds until a page answers, or a clip is made; gradio alone takes ten to import on two busy cores.
START, CLIP = 120.0, 120.0
#: Names of Chromium in distributions.
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")


@contextmanager
def browser() -> Iterator[Any]:
    """Yield a browser; its pages have no access to other hosts."""
    playwright = pytest.importorskip("playwright.sync_api")
    program = next((found for name in CHROMIUM if (found := shutil.which(name))), None)
    assert program is not None, "make test-page installs Chromium"
    with playwright.sync_playwright() as running:
        started = running.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield started
        started.close()


@contextmanager
def served_page(
    port: str, *options: str, folder: Path, key: str = "", script: str = "gradio_demo.py", start: float = START
) -> Iterator[str]:
    """Run a script of a port and yield the address of its page; the script is ended as a supervisor does it.

    Args:
        port: the port.
        options: of the script.
        folder: working directory, and folder of the log.
        key: API key.
        script: in the port's folder of examples.
        start: seconds until the page answers.
    """
    tcp_port = free_port()
    url = f"http://127.0.0.1:{tcp_port}"
    program = [sys.executable] if script.endswith(".py") else ["sh"]
    line = [*program, str(EXAMPLES / port / script), *options, "--port", str(tcp_port)]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "API_KEY": key, "PATH": path, "OMP_NUM_THREADS": "1"}
    with (folder / "page.log").open("wb") as log:
        process = subprocess.Popen(line, env=environment, cwd=folder, stdout=log, stderr=subprocess.STDOUT)
    try:
        _wait(url, process, folder / "page.log", start)
        yield url
    finally:
        process.terminate()
        assert process.wait(60) == 0, (folder / "page.log").read_text(errors="replace")[-4000:]


def _wait(url: str, process: subprocess.Popen[bytes], log: Path, start: float) -> None:
    deadline = time.monotonic() + start
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(url, trust_env=False).status_code == 200:
                return
        except httpx.HTTPError:
            time.sleep(0.5)
    raise AssertionError(f"the page did not start:\n{log.read_text(errors='replace')[-4000:]}")
