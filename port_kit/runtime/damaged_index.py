"""The error of a JSON file of a model directory that vLLM-Omni reads before the kit; see ``damaged_index`` in
``patches.md``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

from port_kit.errors import PortKitError
from port_kit.escape import reason_of


def naming_the_file(read: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``get_hf_file_to_dict`` of vLLM: the error of a file that is no JSON names the file."""

    @wraps(read)
    def run(file_name: str, model: str | Path, revision: str | None = "main") -> Any:
        try:
            return read(file_name, model, revision)
        except (ValueError, RecursionError) as error:
            path = Path(model) / file_name
            if not path.is_file():
                raise
            raise PortKitError(
                f"cannot read {path}: {reason_of(error)}",
                code="model_incomplete",
                hint="assemble the directory again: port-kit download PORT --output-dir DIR",
            ) from error

    return run
