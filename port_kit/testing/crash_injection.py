"""Downloads in child processes that can be killed, at a moment or at a step, with a real SIGKILL.

One process imports everything and forks for each run, so that a run costs milliseconds::

    with ForkServer() as fork_server:
        child = fork_server.start(recipe, directory, kill_at=17, endpoint=hub.endpoint)
        assert child.wait() == -signal.SIGKILL
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from port_kit.download import Policy, Recipe, download
from port_kit.download.progress import Progress
from port_kit.errors import PortKitError

#: functions that change the disk; a run is killed before one of these calls
STEPS = ("replace", "rename", "fsync", "pwrite", "ftruncate", "unlink", "mkdir", "rmdir", "write")

_DEADLINE = 300  # seconds for one message of the fork server


class Child:
    """A run in a process of its own."""

    def __init__(self, fork_server: ForkServer, pid: int) -> None:
        self.pid = pid
        self._fork_server = fork_server

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal; a process that has ended already stays ended."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def wait(self) -> int:
        """Return the exit status, or minus the signal that ended it; 1 for a failed download."""
        return int(self._fork_server.read()["status"])


class ForkServer:
    """The process that forks; a context manager. One child at a time."""

    def __enter__(self) -> ForkServer:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "port_kit.testing.crash_injection"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(_DEADLINE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            raise
        self._process.stdout.close()

    def start(
        self,
        recipe: Recipe,
        directory: Path,
        *,
        kill_at: int | None = None,
        policy: Policy | None = None,
        log: Path | None = None,
        **options: object,
    ) -> Child:
        """Start a download.

        Args:
            recipe, directory, options: as for :func:`port_kit.download.download`.
            kill_at: number of the disk operation (from 0) before which the process kills itself.
            policy: timeouts and retries.
            log: gets one line: the number of disk operations of a run that ended, or its error's code.
        """
        order = {
            "recipe": dataclasses.asdict(recipe),
            "directory": str(directory),
            "kill_at": kill_at,
            "policy": dataclasses.asdict(policy or Policy()),
            "log": str(log) if log else None,
            "options": options,
        }
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        return Child(self, int(self.read()["pid"]))

    def read(self) -> dict[str, Any]:
        """Return the next message of the process.

        Raises:
            TimeoutError: there was none within ``_DEADLINE`` seconds; the process is killed.
        """
        assert self._process.stdout is not None
        timer = threading.Timer(_DEADLINE, self._process.kill)
        timer.start()
        try:
            line = self._process.stdout.readline()
        finally:
            timer.cancel()
        if not line:
            raise TimeoutError(f"the fork server sent no message within {_DEADLINE} s, or died")
        return json.loads(line)


def count_steps(before: Callable[[int], None]) -> Callable[[], int]:
    """Call ``before(number)`` ahead of each disk operation of this process; return a function that counts them."""
    number = 0

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal number
            before(number)
            number += 1
            return function(*args, **kwargs)

        return run

    for name in STEPS:
        setattr(os, name, watched(getattr(os, name)))
    return lambda: number


def _run(order: dict[str, Any]) -> int:
    """Run in the child: download, and die at the ordered step."""
    kill_at = order["kill_at"]

    def before(number: int) -> None:
        if number == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    steps = count_steps(before)
    outcome, status = "", 0
    try:
        recipe, policy = Recipe.from_dict(order["recipe"]), Policy(**order["policy"])
        download(recipe, order["directory"], policy=policy, progress=Progress(), **order["options"])
        outcome = str(steps())
    except PortKitError as error:
        outcome, status = error.code, 1
    except KeyboardInterrupt:
        outcome, status = "interrupted", 130
    if order["log"]:
        Path(order["log"]).write_text(outcome, encoding="utf-8")
    return status


def _serve() -> None:
    """Fork for each order; no threads live here, so that forking is safe."""
    from huggingface_hub import hf_hub_url, try_to_load_from_cache  # noqa: F401 - imported once for all children

    import port_kit.download.fetch  # noqa: F401

    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            status = _run(json.loads(line))
            os._exit(status)
        print(json.dumps({"pid": pid}), flush=True)
        _, code = os.waitpid(pid, 0)
        print(json.dumps({"status": os.waitstatus_to_exitcode(code)}), flush=True)


if __name__ == "__main__":
    _serve()
