"""Servers on tiny models, started by the commands of the examples' pages, and the examples' clients."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from port_kit.testing.server import ApiServer
from tests.project.test_commands import commands

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "online_serving"
#: Path on which the scripts find ``port-kit`` and ``vllm``.
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


def download_as_written(port: str, folder: Path) -> tuple[Path, list[str]]:
    """Run the command of a port's page that makes the tiny model.

    Returns:
        The model directory, and the options of the page's command that serves it.
    """
    written = commands(EXAMPLES / port / "README.md")
    script, *options = next(words[1:] for words in written if words[1:] and words[1].endswith(f"download_{port}.py"))
    path = (EXAMPLES / port / script).resolve()
    subprocess.run([sys.executable, str(path), *options], cwd=folder, check=True, capture_output=True, timeout=300)
    model, *arguments = next(words[1:] for words in written if words[0] == "./run_server.sh")
    return folder / model, arguments


@contextmanager
def serving(port: str, folder: Path, *options: str, **environment: str) -> Iterator[ApiServer]:
    """Serve the tiny model of a port; the server's process group is killed in the end."""
    model, arguments = download_as_written(port, folder)
    variables = {"OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "INFO", "PATH": PATH, **environment}
    arguments += ["--storage", str(folder / "storage"), *options]
    script = EXAMPLES / port / "run_server.sh"
    with ApiServer(model, *arguments, folder=folder, environment=variables, script=script) as running:
        yield running


def find_workers(server: ApiServer) -> list[psutil.Process]:
    """The two workers of a server's engine."""
    children = psutil.Process(server.pid).children(recursive=True)
    workers = [process for process in children if "DiffusionWorker" in " ".join(process.cmdline())]
    assert len(workers) == 2
    return workers


def run_client(
    command: list[str], server: ApiServer, key: str = "", *, folder: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run one of the examples' clients against a server, whose address a shell script reads from BASE_URL.

    ``folder`` is the working directory.
    """
    environment = {**os.environ, "BASE_URL": server.url, "POLL_SECONDS": "0.2", "API_KEY": key, "OPENAI_API_KEY": key}
    environment |= {"NO_PROXY": "127.0.0.1", "PATH": PATH, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=300)
