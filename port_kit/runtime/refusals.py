"""Errors of the kit that reach a command through vLLM-Omni, shown once and without tracebacks.

vLLM-Omni wraps an error of a port, logs it with its traceback several times, and its orchestrator thread raises it
again. A command prints the error of the kit alone; all other errors keep their tracebacks.
"""

from __future__ import annotations

import logging
import threading

from port_kit.errors import PortKitError

#: Loggers whose handlers print the records of vLLM and vLLM-Omni.
_LOGGERS = ("", "vllm", "vllm_omni")


def refusal_of(error: BaseException | None) -> PortKitError | None:
    """Return the error of the kit that an exception is, or that is its explicit cause; None for other exceptions."""
    while error is not None and not isinstance(error, PortKitError):
        error = error.__cause__
    return error


def hide_tracebacks_of_refusals() -> None:
    """Hide log records and thread tracebacks of errors of the kit, for the rest of the process.

    Call it in a command, after vLLM-Omni is imported, and print the error itself. It lasts because the orchestrator
    thread reports an error after the main thread has received it. Idempotent.

    Raises:
        RegistrationError: ``upstream_changed``.
    """
    from port_kit.upstream.engine_logging import install_handlers  # here: every command imports this module

    install_handlers()
    handlers = [handler for name in _LOGGERS for handler in logging.getLogger(name).handlers]
    # Python prints the records of loggers without handlers through the one of last resort
    for handler in [*handlers, *filter(None, [logging.lastResort])]:
        handler.addFilter(_is_no_refusal)
    if threading.excepthook is not _report_others:
        threading.excepthook = _report_others


def _is_no_refusal(record: logging.LogRecord) -> bool:
    return not record.exc_info or refusal_of(record.exc_info[1]) is None


def _report_others(arguments: threading.ExceptHookArgs) -> None:
    """Print the traceback of a thread unless it ended with an error of the kit."""
    if refusal_of(arguments.exc_value) is None:
        threading.__excepthook__(arguments)
