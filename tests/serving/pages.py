"""Commands of the examples' pages, executed as they are written, on a running server."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from port_kit.testing.server import ApiServer
from tests.project.test_commands import commands
from tests.serving.helpers import EXAMPLES, run_client

#: Address in the pages.
WRITTEN = "http://127.0.0.1:8000"


def client_commands(port: str) -> list[list[str]]:
    """Return the words of the commands of a port's page that talk to a server, in their order."""
    found = commands(EXAMPLES / port / "README.md")
    return [words for words in found if {"client.py", "curl"} & set(words[:2]) or is_curl_script(words)]


def is_curl_script(words: list[str]) -> bool:
    """Return True for a command of one of the scripts that request a video with curl."""
    return words[0].startswith("./run_curl_")


def benchmark_command(port: str, model: Path, server: ApiServer) -> list[str]:
    """Return the words of the command of a port's page that measures a server, for the tiny model."""
    words = next(words for words in commands(EXAMPLES / port / "README.md") if words[:2] == ["vllm", "bench"])
    return [word.replace(WRITTEN, server.url).replace("tiny", str(model)) for word in words]


def run_written(
    words: list[str], port: str, server: ApiServer, folder: Path, *, key: str, small: dict[str, int], job: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run a command of a page in a folder of its own.

    Args:
        words: of the command.
        port: whose page it is.
        server: takes the place of the address that is written.
        folder: working directory.
        key: API key.
        small: fields that make the request small, unless the command has them.
        job: id of a job, for ``ID``.
    """
    words = [word.replace(WRITTEN, server.url).replace("/ID", f"/{job}") for word in words]
    is_request = {"client.py", "--form-string"} & set(words) or is_curl_script(words)
    is_request = is_request and not {"--samples", "--sample"} & set(words)
    if any(word.startswith("size=") for word in words):
        small = {name: value for name, value in small.items() if name not in ("width", "height")}
    if words[0] == "curl":
        words += ["--fail-with-body", "--noproxy", "*", "--header", f"Authorization: Bearer {key}"]
    if words[0] == "python":
        words = [sys.executable, str(EXAMPLES / port / words[1]), *words[2:], "--server", server.url]
        given = [(f"--{name.replace('_', '-')}", str(value)) for name, value in small.items()]
    else:
        words = ["sh", str(EXAMPLES / port / words[0]), *words[1:]] if is_curl_script(words) else words
        given = [("-F", f"{name}={value}") for name, value in small.items()]
    # of a repeated field, the last value counts
    words += [word for pair in given for word in pair] if is_request else []
    assert shutil.which(words[0]), words[0]
    return run_client(words, server, key, folder=folder)
