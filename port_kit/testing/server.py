"""vLLM-Omni's API server in a process of its own, for tests of online serving. ::

    with ApiServer(model_dir, "--dtype", "float32", "--enforce-eager", folder=tmp_path) as server:
        httpx.get(f"{server.url}/v1/videos")

The server is started as a user starts it (``vllm serve MODEL --omni``). It leads a process group, which is killed in
the end in any state; the kernel kills it too if its parent dies unexpectedly.
Linux only.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType

LAUNCHER = (sys.executable, "-m", "port_kit", "serve")

_PR_SET_PDEATHSIG = 1
_GRACE = 5.0


class ApiServer:
    """A running server.

    Args:
        model: a model directory.
        arguments: options for ``port-kit serve``, beside the address and the storage.
        folder: folder of its log (``server.log``) and its finished videos (``storage/``).
        environment: variables on top of this process's.
        directory: working directory of the server, for relative paths in its options; default: ``folder``.
        script: a shell script that starts it there, with the model and the options as arguments; None is
            ``port-kit serve``.
        start_timeout: seconds until it must answer; importing vLLM alone takes many on a busy machine.

    Attributes:
        url: ``http://127.0.0.1:PORT``.
        storage: the folder of finished videos.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *arguments: str,
        folder: Path,
        environment: dict[str, str] | None = None,
        directory: Path | None = None,
        script: Path | None = None,
        start_timeout: float = 400.0,
    ) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.storage = folder / "storage"
        self.log = folder / "server.log"
        self._command = [
            *(LAUNCHER if script is None else ("sh", os.fspath(script))),
            *(os.fspath(model), "--host", "127.0.0.1", "--port", str(self.port)),
            *(("--storage", str(self.storage)) if script is None else ()),
            *arguments,
        ]
        self._environment = {
            **os.environ,
            **(environment or {}),
        }
        self._directory = directory or folder
        self._start_timeout = start_timeout
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> ApiServer:
        """Start the server and wait until it answers.

        Raises:
            RuntimeError: it ended, or did not answer in time; with the end of its log.
        """
        self.storage.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                self._command,
                cwd=self._directory,
                env=self._environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )
        try:
            self._wait()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """The leader of the server's process group."""
        if self._process is None:
            raise RuntimeError("the server has not been started")
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """Exit code of the server; None while it runs."""
        return None if self._process is None else self._process.poll()

    def is_alive(self) -> bool:
        """True if the server process is running."""
        return self._process is not None and self._process.poll() is None

    def memory(self) -> int:
        """Resident memory of all processes of the server, in bytes."""
        import psutil

        total = 0
        for process in psutil.process_iter(["pid"]):
            with contextlib.suppress(psutil.Error, ProcessLookupError):
                if os.getpgid(process.pid) == self.pid:
                    total += process.memory_info().rss
        return total

    def tail(self, characters: int = 4000) -> str:
        """Return the end of the server's log."""
        return self.log.read_text(encoding="utf-8", errors="replace")[-characters:]

    def stop(self) -> None:
        """Ask the process group to end, wait a moment, and kill its remaining processes."""
        if self._process is None:
            return
        for sign in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, sign)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_GRACE)

    def _wait(self) -> None:
        deadline = time.monotonic() + self._start_timeout
        while time.monotonic() < deadline:
            if not self.is_alive():
                raise RuntimeError(f"the server ended while it was starting:\n{self.tail()}")
            with (
                contextlib.suppress(urllib.error.URLError, OSError),
                urllib.request.urlopen(f"{self.url}/health", timeout=10),
            ):
                return
            time.sleep(0.5)
        raise RuntimeError(f"the server did not answer within {self._start_timeout:g} s:\n{self.tail()}")


def free_port() -> int:
    """Return a TCP port of the loopback interface that no process uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _die_with_parent() -> None:
    """Let the kernel kill this process when its parent dies; runs in the child, before it becomes the server."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
