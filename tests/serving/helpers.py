"""Servers on tiny models, and the examples' clients."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from port_kit.download import Recipe
from port_kit.registry import find_port
from port_kit.testing.server import ApiServer
from port_kit.testing.tiny_port import download_tiny

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "online_serving"


@contextmanager
def serving(recipe: Recipe, folder: Path, *options: str, **environment: str) -> Iterator[ApiServer]:
    """Serve the tiny model of a recipe; the server's process group is killed in the end."""
    model = download_tiny(find_port(recipe.name), folder / "model").directory
    variables = {"OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "INFO", **environment}
    arguments = ("--dtype", "float32", "--enforce-eager", *options)
    with ApiServer(model, *arguments, folder=folder, environment=variables) as running:
        yield running


def run_client(
    command: list[str], server: ApiServer, key: str = "", *, folder: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run one of the examples' clients against a server, whose address a shell script reads from SERVER.

    ``folder`` is the working directory.
    """
    environment = {**os.environ, "SERVER": server.url, "NO_PROXY": "127.0.0.1", "API_KEY": key}
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=300)
