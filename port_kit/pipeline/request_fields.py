"""Fields of requests as data: names, kinds, defaults and ranges, for pages and other forms.

A port states them as ``FIELDS`` in its ``config``, or as :class:`~port_kit.pipeline.prompt_request.PromptOptions` in
``OPTIONS``. The constants are those that the port's checks use; a test compares both.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from port_kit.port import Port, lookup

if TYPE_CHECKING:
    from port_kit.pipeline.prompt_request import PromptOptions


@dataclass(frozen=True)
class RequestField:
    """One value that requests may set.

    Attributes:
        name: of the field of a server's form, or of the option in ``extra_params``.
        kind: ``int``, ``float``, ``text`` or ``choice``.
        default: of a request without the field; None if the model directory, the references or the length decide.
        minimum, maximum: the range of a number; None for no bound.
        multiple: a whole number is ``offset`` and a multiple of it.
        offset: see ``multiple``.
        choices: of the kind ``choice``.
        help: one line for users.
        is_option: True if the field is an option of the port, which ``extra_params`` has.
    """

    name: str
    kind: str
    default: Any = None
    minimum: float | None = None
    maximum: float | None = None
    multiple: int = 1
    offset: int = 0
    choices: tuple[str, ...] = ()
    help: str = ""
    is_option: bool = False

    @property
    def range_text(self) -> str:
        """The range for users, such as ``0.01 to 100``; empty if there is none."""
        low, high = (None if bound is None else f"{bound:.15g}" for bound in (self.minimum, self.maximum))
        bounds = {(True, True): f"{low} to {high}", (True, False): f"{low} or more", (False, True): f"up to {high}"}
        parts = [bounds.get((low is not None, high is not None), "")]
        if self.multiple > 1:
            parts.append(f"{f'{self.offset} and ' if self.offset else ''}a multiple of {self.multiple}")
        return ", ".join(part for part in parts if part)


def request_fields(port: Port) -> tuple[RequestField, ...]:
    """Return the fields of a port's requests, beside its prompt and references.

    A port that states neither ``FIELDS`` nor ``OPTIONS`` has those of any model, without ranges.
    """
    stated: Any = lookup(f"{port.package}.config:FIELDS")
    if stated is not None:
        return tuple(stated)
    options: Any = lookup(f"{port.package}.config:OPTIONS")
    fields = _of_any_model(port.seed) if options is None else fields_of_options(options)
    return (*fields, *_options(port, {field.name for field in fields}))


def size_fields(height: int | None, width: int | None, *, multiple: int, maximum: int) -> tuple[RequestField, ...]:
    """Return the fields of the size of a video, in pixels."""
    sides = (("width", width), ("height", height))
    return tuple(RequestField(name, "int", side, multiple, maximum, multiple) for name, side in sides)


def fields_of_options(options: PromptOptions) -> tuple[RequestField, ...]:
    """Return the fields of prompt requests. A model directory may have a default size of its own."""
    from port_kit.pipeline.prompt_request import MAX_SCALE, MAX_STEPS

    sides = size_fields(None, None, multiple=options.size_multiple, maximum=options.max_side)
    frames = RequestField(
        "num_frames",
        "int",
        options.frames,
        1 + options.frame_step,
        options.max_frames,
        options.frame_step,
        offset=1,
    )
    return (
        *(sides if options.height else ()),
        *((frames,) if options.frames > 1 else ()),
        RequestField("num_inference_steps", "int", options.steps, options.min_steps, MAX_STEPS),
        RequestField("seed", "int", options.seed, 0),
        RequestField("guidance_scale", "float", options.guidance_scale, -MAX_SCALE, MAX_SCALE),
        RequestField("negative_prompt", "text", options.negative_prompt, help="what the video should not have"),
    )


def _of_any_model(seed: int) -> tuple[RequestField, ...]:
    return (
        *(RequestField(name, "int", minimum=1) for name in ("width", "height")),
        RequestField("num_frames", "int", minimum=1),
        RequestField("num_inference_steps", "int", minimum=1),
        RequestField("seed", "int", seed, 0),
        RequestField("guidance_scale", "float"),
        RequestField("negative_prompt", "text", help="what the video should not have"),
    )


def _options(port: Port, known: Iterable[str]) -> tuple[RequestField, ...]:
    """Return the options that a port declares by name and type only."""
    kinds = {"str": "text"}
    return tuple(
        RequestField(name, kinds.get(kind, kind), is_option=True)
        for name, kind in port.request_options.items()
        if name not in known
    )
