"""Fields of requests of the fusion ports, from the constants that their checks use."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from port_kit.models.wan.pipeline import request
from port_kit.pipeline.guidance_gate import GUIDANCE_GATE
from port_kit.pipeline.request_fields import RequestField, size_fields


def fusion_fields(
    scales: Any, *, height: int | None, width: int | None, seed: int, multiple: int = request.SIZE_MULTIPLE
) -> tuple[RequestField, ...]:
    """Return the fields that all ports have, and the guidance scales of one.

    Args:
        scales: the port's dataclass of guidance scales.
        height, width: default size in pixels.
        seed: default of the port.
        multiple: both sides are multiples of it.
    """
    limit = request.MAX_SCALE
    return (
        *size_fields(height, width, multiple=multiple, maximum=request.MAX_SIDE),
        RequestField("num_inference_steps", "int", request.DEFAULT_STEPS, 1, request.MAX_STEPS),
        RequestField("seed", "int", seed, 0),
        *(_option(field.name, "float", field.default, -limit, limit, help="") for field in fields(scales)),
        _option(
            "shift",
            "float",
            request.DEFAULT_SHIFT,
            request.MIN_SHIFT,
            request.MAX_SHIFT,
            help="larger: more steps on coarse structure",
        ),
        _option("solver_name", "choice", request.DEFAULT_SOLVER, choices=request.SOLVERS, help=""),
        _option(
            "video_negative_prompt",
            "text",
            request.DEFAULT_VIDEO_NEGATIVE_PROMPT,
            help="what the video should not have",
        ),
        _option(
            "audio_negative_prompt",
            "text",
            request.DEFAULT_AUDIO_NEGATIVE_PROMPT,
            help="what the audio should not have",
        ),
        _option(GUIDANCE_GATE, "int", None, 1, None, help="steps with full guidance, up to all steps"),
    )


def _option(name: str, kind: str, default: Any, minimum: Any = None, maximum: Any = None, **more: Any) -> RequestField:
    return RequestField(name, kind, default, minimum, maximum, is_option=True, **more)
