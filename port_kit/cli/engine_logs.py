"""Log levels of vLLM-Omni and its workers, which read them from environment variables."""

from __future__ import annotations

import logging
import os

#: Variables of a run without logs: progress bars, and torch's notice that Triton is not installed.
_QUIET = {"TQDM_DISABLE": "1", "TORCH_LOGS": "-torch._library.triton"}


def set_engine_logs(verbose: int = 0, *, override: bool = False) -> None:
    """Set the log level of the engine and its workers: errors, INFO with ``verbose``, DEBUG with two.

    Variables that are set already are kept. By default vLLM logs to stdout, which is reserved for data.

    Args:
        verbose: as ``-v`` counts.
        override: replace the level, for an option of a command that follows those of ``port-kit``.
    """
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    level = {0: logging.ERROR, 1: logging.INFO}.get(verbose, logging.DEBUG)
    if override:
        os.environ["VLLM_LOGGING_LEVEL"] = logging.getLevelName(level)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", logging.getLevelName(level))
    for name, value in _QUIET.items():
        if verbose:
            if os.environ.get(name) == value:
                del os.environ[name]
        else:
            os.environ.setdefault(name, value)
