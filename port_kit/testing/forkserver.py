"""Processes forked from one that has imported vLLM-Omni, which takes a processor a quarter of a minute.

:func:`run_forked` runs a Python command in place of :func:`subprocess.run`; :func:`fork_workers` lets a script that
starts several engines fork their workers. Neither is for servers: what a user starts is tested as a user starts it.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

from port_kit.registry import list_ports

#: Modules that a server imports once.
_PRELOADED = ("vllm_omni.entrypoints.omni", "vllm_omni.diffusion.worker", "diffusers", "transformers")
#: Libraries read these when they are imported.
_READ_AT_IMPORT = ("HF_", "HUGGINGFACE_", "OMP_", "TORCH", "TRANSFORMERS_", "VLLM_")
#: Variables of a session's processes; several share a processor.
_INITIAL = {**os.environ, "OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1,localhost"}


def fork_workers() -> None:
    """Fork the workers of this process's engines from a server, instead of spawning each."""
    start = multiprocessing.set_start_method
    multiprocessing.set_forkserver_preload(list(_PRELOADED))
    multiprocessing.set_start_method = lambda method, force=False: start("forkserver", force=True)


def run_forked(
    command: Sequence[str], *, timeout: float, cwd: Path | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run a script or module of this interpreter in a forked process, in a session of its own; capture its output.

    Engines that it starts fork their workers, too.

    Args:
        command: ``[sys.executable, SCRIPT, ...]`` or ``[sys.executable, "-m", MODULE, ...]``.
        timeout: seconds.
        cwd: default: the current folder.
        variables: in addition to the environment that this process was started with.

    Raises:
        subprocess.TimeoutExpired: the process and all that it started were killed.
        ValueError: libraries read one of the variables when they are imported.
    """
    late = sorted(name for name in variables if name.startswith(_READ_AT_IMPORT))
    if late or command[0] != sys.executable:
        raise ValueError(f"a forked process cannot have its own {', '.join(late) or 'interpreter'}: use subprocess.run")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_PRELOADED))
    with mock.patch.dict(os.environ, _INITIAL, clear=True):
        forkserver.ensure_running()
    with tempfile.TemporaryDirectory() as folder:
        arguments = (list(command[1:]), {**_INITIAL, **variables}, str(cwd or Path.cwd()), folder)
        forked = context.Process(target=_run, args=arguments)
        forked.start()
        forked.join(timeout)
        expired = forked.exitcode is None
        if expired:
            os.killpg(forked.pid or 0, signal.SIGKILL)
            forked.join()
        texts = [Path(folder, name).read_text(encoding="utf-8", errors="replace") for name in ("out", "err")]
    if expired:
        raise subprocess.TimeoutExpired(list(command), timeout, *texts)
    return subprocess.CompletedProcess(list(command), forked.exitcode or 0, *texts)


def _run(arguments: list[str], environment: dict[str, str], cwd: str, folder: str) -> None:
    """Become the process of a command; its output goes to ``out`` and ``err`` in ``folder``."""
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(Path(folder, name), os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    is_module = arguments[0] == "-m"
    sys.argv = arguments[is_module:]
    sys.path[:] = [cwd if is_module else str(Path(arguments[0]).parent), *_search_path(environment)]
    _announce_ports()
    fork_workers()
    _fork_server(str(Path(folder, "workers")))
    if is_module:
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(str(Path(arguments[0]).resolve()), run_name="__main__")


def _search_path(environment: Mapping[str, str]) -> list[str]:
    """Return PYTHONPATH, and the interpreter's own part of the search path."""
    own = [place for place in sys.path if place.startswith((sys.prefix, sys.base_prefix))]
    return [*filter(None, environment.get("PYTHONPATH", "").split(os.pathsep)), *own]


def _announce_ports() -> None:
    """Let the plugin announce the ports of this process's PORT_KIT_PATH, as it does when vLLM-Omni is imported."""
    list_ports.cache_clear()
    (plugin,) = entry_points(group="vllm_omni.platform_plugins", name="port_kit")
    plugin.load()()


def _fork_server(address: str) -> None:
    """Make a fork of this process, in its present state, the server that :mod:`multiprocessing` forks from."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    alive_r, alive_w = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(alive_w)
        try:
            forkserver.main(listener.detach(), alive_r, [])
        finally:
            os._exit(0)
    listener.close()
    os.close(alive_r)
    state = {"_forkserver_address": address, "_forkserver_alive_fd": alive_w, "_forkserver_pid": pid}
    vars(forkserver._forkserver).update(state)
