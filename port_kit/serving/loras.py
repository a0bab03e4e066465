"""LoRA files that requests may name: those below the server's configured folders."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from port_kit.escape import quoted
from port_kit.serving.asgi import Refusal
from port_kit.serving.limits import Limits, option

#: ``int_id`` is what clients of vLLM-Omni send; files are told apart by their content.
KEYS = ("name", "path", "scale", "int_id")
#: Largest magnitude of a scale; trainers publish scales up to 2.
MAX_SCALE = 10.0


def resolve_lora(given: object, limits: Limits) -> dict[str, Any]:
    """Return the value of a ``lora`` field with the path of a file below a configured folder.

    The answer to a file outside the folders and to one that does not exist is the same, so that it tells nothing about
    the server's files.

    Args:
        given: dict with ``name`` or ``path``, and optionally ``scale``. ``path`` is relative to a configured folder, or
            absolute.
        limits: of the server.

    Raises:
        Refusal: the field cannot be used.
    """
    given = _checked(given)
    if not limits.lora_roots:
        raise Refusal(400, f"lora: this server has no folder of LoRA files ({option('lora_roots')} adds one)")
    asked = given.get("path") or given.get("name")
    if not isinstance(asked, str) or not asked:
        raise Refusal(400, "lora has neither name nor path; one of them is required")
    found = _find(asked, [Path(root).resolve() for root in limits.lora_roots])
    if found is None:
        raise Refusal(400, f"lora: this server has no LoRA {quoted(asked)}")
    named = given.get("name")
    lora = {"name": named if isinstance(named, str) and named else asked, "path": str(found)}
    return {**lora, "scale": _scale(given.get("scale", 1.0))}


def _checked(given: object) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise Refusal(400, f"lora is {type(given).__name__}; a JSON object with name or path is required")
    for name in given:
        if name not in KEYS:
            raise Refusal(400, f"lora has the unknown key {quoted(name)}; known are {', '.join(KEYS)}")
    return given


def _find(asked: str, roots: list[Path]) -> Path | None:
    """Return the real path of a file or folder below a root; None if there is none."""
    for root in roots:
        for name in (asked, f"{asked}.safetensors"):
            try:
                found = (root / name).resolve(strict=True)
            except (OSError, ValueError, RuntimeError):
                continue
            if found != root and found.is_relative_to(root):
                return found
    return None


def _scale(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise Refusal(400, f"the scale of lora is {quoted(value)}; a number is required")
    if not math.isfinite(value) or abs(value) > MAX_SCALE:
        raise Refusal(400, f"the scale of lora is {quoted(value)}; -{MAX_SCALE:g} to {MAX_SCALE:g} is required")
    return float(value)
