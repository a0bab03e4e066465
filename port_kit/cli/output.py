"""Output of commands: data on stdout, everything else on stderr; one JSON envelope with ``--json``."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import Any

import click

from port_kit.errors import PortKitError
from port_kit.escape import MAX_REASON, escape_control_chars, shortened
from port_kit.files import os_errors_as
from port_kit.runtime.refusals import refusal_of

SCHEMA = "port-kit/1"
#: Layout characters that text output keeps.
_LAYOUT = "\n\t"


def emit(command: str, data: Mapping[str, Any], *, as_json: bool, text: str | None = None, ok: bool = True) -> None:
    """Print a command's result and exit with 1 if ``ok`` is false.

    Args:
        command: the command's words, ``verify parity``.
        data: the result, JSON-serializable.
        as_json: print the envelope instead of ``text``.
        text: output without ``--json``; None prints no text.
        ok: whether all checks held.
    """
    if as_json:
        click.echo(json.dumps({"schema": SCHEMA, "ok": ok, "command": command, "data": data}, indent=1))
    elif text is not None:
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        click.echo(escape_control_chars(text, keep=_LAYOUT).encode(encoding, "backslashreplace").decode(encoding))
    if not ok:
        raise SystemExit(1)


def toml_path(_context: click.Context, _parameter: click.Parameter, path: Path | None) -> Path | None:
    """Check the path of an option whose file is TOML.

    Raises:
        click.BadParameter: another suffix, by which other commands would read the file.
    """
    if path is not None and path.suffix != ".toml":
        raise click.BadParameter(f"{path} is written as TOML: expected the suffix .toml, found {path.suffix or 'none'}")
    return path


def write_text(path: Path, text: str) -> None:
    """Write a file that an option names; its folder is made.

    Raises:
        DownloadError: ``output_dir`` or ``disk_full`` if it cannot be written.
    """
    with os_errors_as(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def handles_errors(command: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Turn errors of the kit, exceptions that they caused, and errors of paths into a message and exit code 1."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        @wraps(function)
        def run(*args: Any, **kwargs: Any) -> None:
            try:
                function(*args, **kwargs)
            except Exception as error:
                refusal = refusal_of(error) or _unusable_path(error)
                if refusal is None:
                    raise
                _print_error(command, refusal, as_json=bool(kwargs.get("as_json")))
                raise SystemExit(1) from error
            except KeyboardInterrupt as error:
                message, hint = "interrupted", "run the same command again to go on"
                if kwargs.get("as_json"):
                    _print_error(command, PortKitError(message, code="interrupted", hint=hint), as_json=True)
                click.echo(f"{message}; {hint}", err=True)
                raise SystemExit(130) from error

        return run

    return decorate


def _unusable_path(error: Exception) -> PortKitError | None:
    """Return the error of a path that the system refuses, such as one that is too long; None for other exceptions."""
    if not isinstance(error, OSError) or not isinstance(error.filename, str | bytes):
        return None
    path = shortened(os.fsdecode(error.filename), MAX_REASON)
    return PortKitError(f"{path} cannot be used: {error.strerror}", code="file_access", hint="check the path")


def _print_error(command: str, error: PortKitError, *, as_json: bool) -> None:
    if as_json:
        body = {"code": error.code, "message": error.message, "hint": error.hint, "details": error.details}
        click.echo(
            json.dumps({"schema": SCHEMA, "ok": False, "command": command, "error": body}, indent=1, default=str)
        )
        return
    click.echo(error_text(error), err=True)
    sys.stderr.flush()


def error_text(error: PortKitError) -> str:
    """Return an error with its code and its hint, for people."""
    hint = f"\n\nhint: {error.hint}" if error.hint else ""
    return escape_control_chars(f"error [{error.code}]: {error.message}{hint}", keep=_LAYOUT)


json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON envelope on stdout.")
