"""Names of processes that own temporary files and partial downloads, and a check for dead owners."""

from __future__ import annotations

import os
import re
import socket

#: Pattern of results of :func:`owner`: host, process number, start time.
OWNER = r"[\w.-]+~\d+~\d+"


def owner() -> str:
    """Return the name of this process. It has a start time, because process numbers are reused."""
    return f"{_host()}~{os.getpid()}~{_started(os.getpid())}"


def may_run(name: str, *, elsewhere: bool) -> bool:
    """Return True if the process called ``name`` may still be running.

    Args:
        name: result of :func:`owner` in that process.
        elsewhere: result for a process of another host or container, which cannot be checked.
    """
    host, _, rest = name.partition("~")
    number, _, started = rest.partition("~")
    if host != _host():
        return elsewhere
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return _started(int(number)) == started


def _host() -> str:
    """Containers may share a host name; their process numbers are comparable only within one namespace."""
    try:
        namespace = str(os.stat("/proc/self/ns/pid").st_ino)
    except OSError:
        namespace = "0"
    return f"{re.sub(r'[^a-zA-Z0-9.-]', '-', socket.gethostname())[:48]}-{namespace}"


def _started(process: int) -> str:
    try:
        with open(f"/proc/{process}/stat", "rb") as stream:
            return stream.read().rpartition(b")")[2].split()[19].decode()
    except OSError:
        return "0"
