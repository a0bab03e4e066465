"""LoRA files that requests may name: those below the server's configured folders."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from port_kit.escape import quoted
from port_kit.runtime.lora_sets import MAX_LORAS, write_set
from port_kit.serving.asgi import Refusal
from port_kit.serving.limits import Limits, option

#: ``int_id`` is what clients of vLLM-Omni send; files are identified by their content.
KEYS = ("name", "path", "scale", "int_id")
#: Largest magnitude of a scale; trainers publish scales up to 2.
MAX_SCALE = 10.0


def resolve_lora(given: object, limits: Limits) -> dict[str, Any]:
    """Return the value of a ``lora`` field with the path of a file below a configured folder, or of a set of them.

    The answer to a file outside the folders and to one that does not exist is the same, so that it tells nothing about
    the server's files.

    Args:
        given: dict with ``name`` or ``path``, and optionally ``scale``; or a list of such dicts, which apply together.
            ``path`` is relative to a configured folder, or absolute.
        limits: of the server.

    Raises:
        Refusal: the field cannot be used.
    """
    if not isinstance(given, list):
        return _resolve_one(given, limits)
    if not 1 <= len(given) <= MAX_LORAS:
        raise Refusal(400, f"[input_count] lora lists {len(given)} LoRAs; 1 to {MAX_LORAS} are supported")
    loras = [_resolve_one(one, limits) for one in given]
    if len(loras) == 1:
        return loras[0]
    path = write_set([(lora["path"], lora["scale"]) for lora in loras])
    return {"name": " + ".join(lora["name"] for lora in loras), "path": str(path), "scale": 1.0}


def _resolve_one(given: object, limits: Limits) -> dict[str, Any]:
    given = _checked(given)
    if not limits.lora_roots:
        raise Refusal(
            400,
            "[source_missing] lora: this server has no folder of LoRA files"
            f"\nhint: its operator adds one with {option('lora_roots')}",
        )
    asked = given.get("path") or given.get("name")
    if not isinstance(asked, str) or not asked:
        raise Refusal(400, "[input_missing] lora has neither name nor path; one of them is required")
    found = _find(asked, [Path(root).resolve() for root in limits.lora_roots])
    if found is None:
        raise Refusal(400, f"[source_missing] lora: this server has no LoRA {quoted(asked)}")
    named = given.get("name")
    lora = {"name": named if isinstance(named, str) and named else asked, "path": str(found)}
    return {**lora, "scale": _scale(given.get("scale", 1.0))}


def _checked(given: object) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise Refusal(
            400,
            f"[input_type] lora is {type(given).__name__}; a JSON object with name or path, or a list of such objects,"
            " is required",
        )
    for name in given:
        if name not in KEYS:
            raise Refusal(
                400, f"[input_value] lora has the unknown key {quoted(name)}\nhint: known are {', '.join(KEYS)}"
            )
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
        raise Refusal(400, f"[input_type] the scale of lora is {quoted(value)}; a number is required")
    if not math.isfinite(value) or abs(value) > MAX_SCALE:
        raise Refusal(
            400, f"[input_value] the scale of lora is {quoted(value)}; -{MAX_SCALE:g} to {MAX_SCALE:g} is required"
        )
    return float(value)
