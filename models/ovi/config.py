"""What an Ovi request may set, with the original's defaults, and what sets the three published checkpoints apart."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from port_kit.errors import InputError, PortKitError
from port_kit.models.wan.pipeline.request import (
    MAX_SIDE,
    SIZE_MULTIPLE,
    FusionRequest,
    LatentLengths,
    media_of,
    parse_common,
    prompt_fields,
)
from port_kit.pipeline.inputs import as_list, check_integer

GUIDANCE_BRANCHES = 2  # of the transformer, a step: with the prompt, with the negative prompts
DEFAULT_HEIGHT, DEFAULT_WIDTH = 512, 992  # pixels; only their ratio matters, the checkpoint has its area
DEFAULT_SEED = 103
SKIP_BLOCK = 11  # left out in the pass with the negative prompts; the original calls it slg_layer
#: How far an image's ratio may lie from that of a height and width given beside it.
RATIO_TOLERANCE = 0.02

#: How a checkpoint was taught to read what is heard: between tags, or after a label at the end.
TAGS, LABEL = "tags", "label"
_LABELLED = re.compile(r"Audio:\s*(.*)", re.DOTALL)
_TAGGED = re.compile(r"<AUDCAP>(.*?)<ENDAUDCAP>", re.DOTALL)


@dataclass(frozen=True)
class Variant:
    """What sets a published checkpoint apart; all have one network.

    Attributes:
        file: in the repository ``chetwinlow1/Ovi``.
        video_area: pixels of a frame that it makes, whatever their ratio.
        audio_prompt: :data:`TAGS` or :data:`LABEL`.
        lengths: of its clips: 121 frames with 80,384 samples, or 241 with 160,768.
    """

    file: str
    video_area: int
    audio_prompt: str
    lengths: LatentLengths


#: Ovi 1.0 is the first, Ovi 1.1 the other two.
VARIANTS: Mapping[str, Variant] = {
    "720x720_5s": Variant("model.safetensors", 720 * 720, TAGS, LatentLengths(31, 157)),
    "960x960_5s": Variant("model_960x960.safetensors", 960 * 960, LABEL, LatentLengths(31, 157)),
    "960x960_10s": Variant("model_960x960_10s.safetensors", 960 * 960, LABEL, LatentLengths(61, 314)),
}


@dataclass(frozen=True)
class CheckpointOptions:
    """What a model directory says about requests.

    Attributes:
        video_area: as in :class:`Variant`.
        audio_prompt: the same.
        skip_block: where a request names none.
        blocks: of the transformer.
    """

    video_area: int
    audio_prompt: str
    skip_block: int
    blocks: int

    @classmethod
    def from_index(cls, index: Mapping[str, Any], blocks: int) -> CheckpointOptions:
        """Read ``model_index.json``; raises PortKitError (``model_incomplete``) where it lacks a key."""
        missing = [name for name in ("video_area", "audio_prompt", "skip_block") if name not in index]
        if missing:
            raise PortKitError(
                f"model_index.json lacks {', '.join(missing)}",
                code="model_incomplete",
                hint="assemble the directory again: port-kit download ovi --output-dir DIR",
            )
        return cls(index["video_area"], index["audio_prompt"], index["skip_block"], blocks)


@dataclass(frozen=True)
class GuidanceScales:
    """How far a prediction is pushed towards the prompt, per modality."""

    video_guidance_scale: float = 4.0
    audio_guidance_scale: float = 3.0


@dataclass(frozen=True, kw_only=True)
class OviRequest(FusionRequest):
    """One checked request.

    Attributes:
        prompt: in the form that the checkpoint reads, with ``<S>..<E>`` around what is said.
        image: the first frame, still as the caller gave it; None makes the video from the text alone.
        skip_block: left out in the pass with the negative prompts; 0 leaves out none.
    """

    image: Any = None
    skip_block: int = SKIP_BLOCK
    scales: GuidanceScales = field(default_factory=GuidanceScales)


def parse_request(prompt: Any, sampling: Any, lengths: LatentLengths, model: CheckpointOptions) -> OviRequest:
    """Check a request, the image's content aside; with an image, :func:`size_for_image` decides on the size.

    Args:
        prompt: text, or ``{"prompt": text, "multi_modal_data": {"image": image}}`` as vLLM-Omni takes it.
        sampling: ``OmniDiffusionSamplingParams``. Its ``extra_args`` hold the options of
            :func:`~port_kit.models.wan.pipeline.request.parse_common`, the fields of :class:`GuidanceScales` and
            ``slg_layer``. Height and width give the aspect ratio.
        lengths: of the clip that the model makes.
        model: what the model directory says.

    Raises:
        InputError: with what was given, what is required and what to do.
    """
    fields = prompt_fields(prompt)
    common = parse_common(fields, sampling, lengths, scales=GuidanceScales, options=("slg_layer",), seed=DEFAULT_SEED)
    height, width = _ratio(sampling)
    height, width = size_for_area(height, width, model.video_area)
    skip = (sampling.extra_args or {}).get("slg_layer", model.skip_block)
    common["prompt"] = format_prompt(common["prompt"], model.audio_prompt)
    return OviRequest(
        **common,
        height=height,
        width=width,
        image=_image(media_of(fields)),
        skip_block=check_integer("slg_layer", skip, minimum=0, maximum=model.blocks - 1),
    )


def _ratio(sampling: Any) -> tuple[int, int]:
    """Return height and width as given, both or none; they are scaled later, so any pixels will do."""
    given = {name: getattr(sampling, name) for name in ("height", "width") if getattr(sampling, name) is not None}
    if len(given) == 1:
        (name,) = given
        raise InputError(
            f"{name} is given alone; the two make the ratio of the video",
            code="input_missing",
            hint="give height and width, or neither",
        )
    sides = [check_integer(name, value, minimum=1, maximum=MAX_SIDE) for name, value in given.items()]
    return (sides[0], sides[1]) if sides else (DEFAULT_HEIGHT, DEFAULT_WIDTH)


def _image(media: Mapping[str, Any]) -> Any:
    images, audios = as_list(media.get("image")), as_list(media.get("audio"))
    if len(images) > 1:
        raise InputError(f"{len(images)} images; one, the first frame, is taken", code="input_count")
    if audios:
        raise InputError(
            f"{len(audios)} audio(s); this model reads none",
            code="input_count",
            hint="describe the audio in the prompt",
        )
    return images[0] if images else None


def format_prompt(prompt: str, audio_prompt: str) -> str:
    """Put what is heard into the form that the checkpoint reads, from either form."""
    if audio_prompt == TAGS:
        return _LABELLED.sub(lambda heard: f"<AUDCAP>{heard[1]}<ENDAUDCAP>", prompt)
    return _TAGGED.sub(lambda heard: f"Audio: {heard[1]}", prompt)


def size_for_area(height: int, width: int, area: int) -> tuple[int, int]:
    """Scale a size to an area with its ratio kept, then round each side to the nearest multiple of 32 pixels.

    Raises:
        InputError: a side would be longer than :data:`MAX_SIDE`.
    """
    scale = math.sqrt(area / (height * width))
    cells = [max(1, round(round(side * scale) / SIZE_MULTIPLE)) for side in (height, width)]
    return _checked(cells[0] * SIZE_MULTIPLE, cells[1] * SIZE_MULTIPLE, height, width)


def size_for_image(height: int, width: int, area: int) -> tuple[int, int]:
    """Choose the size in multiples of 32 pixels that comes nearest to the area, then to the image's ratio.

    The candidates are those of the original: seven numbers of rows around the ideal one with the columns that suit
    their ratio, and the sides scaled one by one.

    Raises:
        InputError: a side would be longer than :data:`MAX_SIDE`.
    """
    ratio, cell = width / height, SIZE_MULTIPLE * SIZE_MULTIPLE
    ideal = max(1, round(math.sqrt(max(1, area // cell) / ratio)))
    candidates = [(rows, max(1, round(rows * ratio))) for rows in range(max(1, ideal - 3), ideal + 4)]
    scale = math.sqrt(area / (height * width)) / SIZE_MULTIPLE
    candidates.append((max(1, round(height * scale)), max(1, round(width * scale))))
    rows, columns = min(candidates, key=lambda c: (abs(c[0] * c[1] * cell - area), abs(c[1] / c[0] - ratio)))
    return _checked(rows * SIZE_MULTIPLE, columns * SIZE_MULTIPLE, height, width)


def check_ratio(sampling: Any, height: int, width: int) -> None:
    """Refuse a height and width that another ratio than the image's ``height`` x ``width`` belongs to."""
    if sampling.height is None:
        return
    given, found = sampling.width / sampling.height, width / height
    if abs(given / found - 1) > RATIO_TOLERANCE:
        raise InputError(
            f"height and width are {sampling.height} and {sampling.width}, the image is {height}x{width}; "
            "the video takes the image's ratio",
            code="input_size",
            hint="leave height and width out, or crop the image",
        )


def _checked(height: int, width: int, given_height: int, given_width: int) -> tuple[int, int]:
    if max(height, width) > MAX_SIDE:
        raise InputError(
            f"a ratio of {given_height} to {given_width} gives a video of {height}x{width}; "
            f"sides of at most {MAX_SIDE} are made",
            code="input_size",
            hint="choose a ratio nearer to 1",
        )
    return height, width
