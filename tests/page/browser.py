"""A headless Chromium on a page, and the page as a user starts it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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


@dataclass(frozen=True)
class ServedPage:
    """A page that a script serves.

    Attributes:
        url: its address.
        log: what the script prints.
        process: the script.
    """

    url: str
    log: Path
    process: subprocess.Popen[bytes]

    def wait(self, seconds: float = START) -> str:
        """Wait until it answers, and return its address."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                if httpx.get(self.url, trust_env=False).status_code == 200:
                    return self.url
            except httpx.HTTPError:
                time.sleep(0.5)
        raise AssertionError(f"the page did not start:\n{self.text()[-4000:]}")

    def text(self) -> str:
        """Return what the script has printed."""
        return self.log.read_text(errors="replace")


@contextmanager
def served_page(
    port: str, *options: str, folder: Path, key: str = "", script: str = "gradio_demo.py"
) -> Iterator[ServedPage]:
    """Start a script of a port, without waiting for its page, and end it as a supervisor does it.

    Args:
        port: the port.
        options: of the script.
        folder: working directory, and folder of the log.
        key: API key.
        script: in the port's folder of examples.
    """
    tcp_port = free_port()
    program = [sys.executable] if script.endswith(".py") else ["sh"]
    line = [*program, str(EXAMPLES / port / script), *options, "--port", str(tcp_port)]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "API_KEY": key, "PATH": path, "OMP_NUM_THREADS": "1"}
    with (folder / "page.log").open("wb") as log:
        process = subprocess.Popen(line, env=environment, cwd=folder, stdout=log, stderr=subprocess.STDOUT)
    served = ServedPage(f"http://127.0.0.1:{tcp_port}", folder / "page.log", process)
    try:
        yield served
    finally:
        process.terminate()
        assert process.wait(60) == 0, served.text()[-4000:]
