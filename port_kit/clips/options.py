"""Names of the options of a request, the same on the command line, in a file of prompts and in a clip's settings."""

from __future__ import annotations

from collections.abc import Mapping

from port_kit.errors import InputError
from port_kit.port import Port

#: Types of :attr:`~port_kit.port.Port.request_options`.
TYPES: Mapping[str, type] = {"str": str, "int": int, "float": float}
#: Fields of ``OmniDiffusionSamplingParams`` that are options of every port, beside the seed.
SAMPLING: Mapping[str, type] = {
    "height": int,
    "width": int,
    "num_frames": int,
    "num_inference_steps": int,
    "guidance_scale": float,
}
#: Options of references on the command line, by kind.
MEDIA_OPTIONS = {
    "image": ("--images", "--image", "--image-path"),
    "audio": ("--audios", "--voices", "--audio-path"),
}
#: The clip whose last frame is the first frame of a request, and the number of requests in one clip.
CONTINUE_FROM, SEGMENTS = "continue_from", "segments"
#: Largest number of segments: a frame is an image of the previous segment's, and errors add up.
MAX_SEGMENTS = 100


def option_types(port: Port) -> dict[str, type]:
    """Return the options of a request to a port with their types, without its references."""
    types = {"prompt": str, "negative_prompt": str, **SAMPLING, "seed": int, "num_outputs": int}
    types |= {name: TYPES[kind] for name, kind in port.request_options.items()}
    return types | ({SEGMENTS: int} if port.output_type == "video" else {})


def reference_names(port: Port) -> dict[str, str]:
    """Return the kind of reference by each name that an option or a field has for it."""
    names = {option.removeprefix("--"): kind for kind in port.references for option in MEDIA_OPTIONS[kind]}
    names = {name.replace("-", "_"): kind for name, kind in names.items()}
    return names | ({CONTINUE_FROM: CONTINUE_FROM} if port.output_type == "video" else {})


def check_first_frame(port: Port, request: Mapping[str, object], references: Mapping[str, object]) -> None:
    """Check the options that need a first frame, before an engine starts.

    Args:
        port: the port.
        request: options of a request.
        references: its references by kind.

    Raises:
        InputError: ``input_value``, ``input_count``; the port takes no first frame, or another option excludes them.
    """
    segments = request.get(SEGMENTS, 1)
    if not isinstance(segments, int) or not 1 <= segments <= MAX_SEGMENTS:
        raise InputError(f"segments is {segments}; expected 1 to {MAX_SEGMENTS}", code="input_value")
    used = ([SEGMENTS] if segments > 1 else []) + ([CONTINUE_FROM] if references.get(CONTINUE_FROM) else [])
    if not used:
        return
    if not port.first_frame:
        raise InputError(
            f"{used[0]} needs a port that takes a first frame, and {port.name} takes none",
            code="input_value",
            hint=f"leave {used[0]} out; the card of the port says what its references are",
        )
    if segments > 1 and request.get("num_outputs", 1) != 1:
        raise InputError(
            f"num_outputs is {request['num_outputs']} and segments is {segments}; a clip of segments is one output",
            code="input_count",
            hint="ask for each clip with a seed of its own",
        )
    if references.get(CONTINUE_FROM) and references.get("image"):
        raise InputError(
            "continue_from and image both give the first frame",
            code="input_count",
            hint="leave one of them out",
        )
