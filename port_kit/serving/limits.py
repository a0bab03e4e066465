"""Limits of a server, and where they come from.

``port-kit serve`` passes its options to the server's process as environment variables, because vLLM gives a middleware
no arguments.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self, get_type_hints

from port_kit.errors import ConfigError
from port_kit.escape import quoted

PREFIX = "PORT_KIT_SERVE_"
#: Separates the entries of a list in a variable; names of hosts and folders do not contain it.
SEPARATOR = "\n"


@dataclass(frozen=True)
class Limits:
    """Limits and permissions of a server.

    Attributes:
        max_upload_mb: size of a request's body, in MB of 10**6 bytes.
        upload_seconds: time in which a body must arrive.
        idle_seconds: time in which a client must take each part of an answer.
        max_queue: requests that wait or run; further ones are refused with status 429.
        reference_hosts: hosts from which references may be fetched by URL; none by default.
        fetch_seconds: time for all references of a request that are fetched by URL.
        lora_roots: folders whose LoRA files requests may name; none by default.
        drain_seconds: time that running requests get after SIGTERM.
        keep_seconds: time that finished videos are kept.
    """

    max_upload_mb: float = 64
    upload_seconds: float = 60
    idle_seconds: float = 60
    max_queue: int = 128
    reference_hosts: tuple[str, ...] = ()
    fetch_seconds: float = 20
    lora_roots: tuple[str, ...] = ()
    drain_seconds: float = 10
    keep_seconds: int = 86_400

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, tuple) and not (0 < value < float("inf")):
                raise ConfigError(
                    f"{option(field.name)} is {value}; more than 0 is required",
                    code="config_invalid",
                    hint=f"correct {option(field.name)}, or leave it out",
                )

    @property
    def max_body(self) -> int:
        """Largest body in bytes."""
        return int(self.max_upload_mb * 1e6)

    def to_environment(self) -> dict[str, str]:
        """Return the variables that :meth:`from_environment` reads."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {
            f"{PREFIX}{name.upper()}": SEPARATOR.join(value) if isinstance(value, tuple) else str(value)
            for name, value in values.items()
        }

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Self:
        """Read the limits; those without a variable have their defaults.

        Raises:
            ConfigError: ``config_invalid``; a value is no number.
        """
        given: dict[str, Any] = {}
        for name, kind in get_type_hints(cls).items():
            text = environment.get(f"{PREFIX}{name.upper()}")
            if text is not None:
                given[name] = _parse(name, text, kind)
        return cls(**given)


def option(name: str) -> str:
    """Return the option of ``port-kit serve`` for a field of :class:`Limits`."""
    repeated = {"reference_hosts": "reference_host", "lora_roots": "lora_root"}
    return "--" + repeated.get(name, name).replace("_", "-")


def _parse(name: str, text: str, kind: Any) -> Any:
    if kind not in (int, float):
        return tuple(part for part in text.split(SEPARATOR) if part)
    try:
        return kind(text)
    except ValueError as error:
        raise ConfigError(
            f"{PREFIX}{name.upper()} is {quoted(text)}; a number is required",
            code="config_invalid",
            hint=f"use port-kit serve {option(name)} NUMBER",
        ) from error
