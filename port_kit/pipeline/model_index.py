"""Typed values of ``model_index.json``, and the port of a model directory."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from port_kit.errors import PortKitError
from port_kit.escape import quoted, reason_of
from port_kit.port import Port
from port_kit.registry import port_of_class

INDEX = "model_index.json"


def read_json(model: str | Path, name: str) -> Mapping[str, Any]:
    """Return a JSON file of the model directory.

    Raises:
        PortKitError: ``model_incomplete``, if it is not there or no JSON object.
    """
    path = Path(model) / name
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise incomplete(f"cannot read {path}: {reason_of(error)}") from error
    if not isinstance(content, dict):
        raise incomplete(f"{path} holds {type(content).__name__}, not an object")
    return content


@dataclass(frozen=True)
class ModelIndex:
    """Values of the ``model_index.json`` of a model directory.

    Attributes:
        path: the file.
        values: its content.

    Raises:
        PortKitError: ``model_incomplete``; the file cannot be read, or (of the methods) a key does not exist or has
            another type or range.
    """

    path: Path
    values: Mapping[str, Any]

    @classmethod
    def read(cls, model: str | Path) -> Self:
        """Read the index of a model directory."""
        return cls(Path(model) / INDEX, read_json(model, INDEX))

    def text(self, key: str, choices: Collection[str] = ()) -> str:
        """Return a text, one of ``choices`` if there are any."""
        value = self._value(key)
        if not isinstance(value, str) or (choices and value not in choices):
            raise self._wrong(key, value, f"one of {', '.join(choices)}" if choices else "text")
        return value

    def integer(self, key: str, minimum: int, maximum: int) -> int:
        """Return an integer within ``minimum``..``maximum``."""
        value = self._value(key)
        if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
            raise self._wrong(key, value, f"an integer from {minimum} to {maximum}")
        return value

    def real(self, key: str, minimum: float, maximum: float) -> float:
        """Return a number within ``minimum``..``maximum``."""
        value = self._value(key)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not minimum <= value <= maximum:
            raise self._wrong(key, value, f"a number from {minimum:g} to {maximum:g}")
        return float(value)

    def _value(self, key: str) -> Any:
        if key not in self.values:
            raise incomplete(f"{self.path} lacks {key}")
        return self.values[key]

    def _wrong(self, key: str, value: object, expected: str) -> PortKitError:
        return incomplete(f"{self.path}: {key} is {quoted(value)}; expected {expected}")


def port_of_model(model: str | Path) -> Port:
    """Return the port of a model directory.

    Raises:
        PortKitError: ``model_incomplete``; the directory has no valid index.
        PortNotFoundError: no port serves the class of the index.
    """
    return port_of_class(ModelIndex.read(model).text("_class_name"))


def incomplete(problem: str) -> PortKitError:
    """Return the error of a damaged or incomplete model directory."""
    return PortKitError(
        problem, code="model_incomplete", hint="assemble the directory again: port-kit download PORT --output-dir DIR"
    )
