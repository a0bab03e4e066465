"""The process of a server: vLLM's command line, with an exit code that says why it ended.

``python -m port_kit.serving.process serve MODEL --omni ...``
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import time
from os import _exit

from port_kit.runtime.progress import FOLDER, MEMORY

#: Exit code of a server whose engine has died.
DEAD = 1
#: Time for an orderly end after the engine died; then the process ends at once.
EXIT_SECONDS = 20.0

_died = threading.Event()


def end_after_death() -> None:
    """Make this process end with :data:`DEAD`, at the latest after :data:`EXIT_SECONDS`."""
    _died.set()
    threading.Thread(target=_end_later, daemon=True).start()


def _end_later() -> None:
    # a dead engine may block the orderly end
    time.sleep(EXIT_SECONDS)
    shutil.rmtree(os.environ[FOLDER], ignore_errors=True)
    _exit(DEAD)


def main() -> None:
    """Serve until a signal or the death of the engine."""
    from vllm.entrypoints.cli.main import main as serve

    with tempfile.TemporaryDirectory(prefix=f"port_kit_progress_{os.getpid()}_", dir=MEMORY) as folder:
        os.environ[FOLDER] = folder  # the workers inherit it
        serve()
    if _died.is_set():
        raise SystemExit(DEAD)


if __name__ == "__main__":
    from port_kit.serving import process  # the gateway imports the module under this name

    process.main()
