"""Options of Ovi requests with the original's defaults, and of the three published checkpoints."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from port_kit.errors import InputError
from port_kit.models.wan.pipeline.request import (
    MAX_AREA,
    MAX_SIDE,
    SIZE_MULTIPLE,
    FusionRequest,
    LatentLengths,
    media_of,
    parse_common,
    prompt_fields,
)
from port_kit.models.wan.pipeline.request_fields import fusion_fields
from port_kit.models.wan.transformer.config import OVI_TRANSFORMER_CONFIG
from port_kit.pipeline.inputs import as_list, check_integer, first_frame_of
from port_kit.pipeline.model_index import ModelIndex
from port_kit.pipeline.request_fields import RequestField
from port_kit.pipeline.skip_layers import SkipLayers, parse_skip_layers

DEFAULT_HEIGHT, DEFAULT_WIDTH = 512, 992  # pixels; only their ratio matters, the checkpoint sets the area
DEFAULT_SEED = 103
#: Kinds of media that are read or rejected with a reason; a timeline guide may be an image at the first frame.
MEDIA = ("image", "audio", "timeline_guides")
SKIP_BLOCK = 11  # omitted in the branch with the negative prompts; slg_layer in the original
#: Largest relative difference between the aspect ratios of an image and of the height and width of a request.
RATIO_TOLERANCE = 0.02

#: Prompt formats for the description of audio: between tags, or after a label at the end.
TAGS, LABEL = "tags", "label"
_LABELLED = re.compile(r"Audio:\s*(.*)", re.DOTALL)
_TAGGED = re.compile(r"<AUDCAP>(.*?)<ENDAUDCAP>", re.DOTALL)


@dataclass(frozen=True)
class Variant:
    """Options of a published checkpoint; all have the same network.

    Attributes:
        file: in the repository ``chetwinlow1/Ovi``.
        video_area: pixels per frame, for all aspect ratios.
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
    """Options of the checkpoint in a model directory.

    Attributes:
        video_area: as in :class:`Variant`.
        audio_prompt: as in :class:`Variant`.
        skip_block: default of requests.
        blocks: number of blocks of the transformer.
    """

    video_area: int
    audio_prompt: str
    skip_block: int
    blocks: int

    @classmethod
    def from_index(cls, index: ModelIndex, blocks: int) -> CheckpointOptions:
        """Read ``model_index.json``; raise PortKitError (``model_incomplete``) for a wrong value."""
        return cls(
            index.integer("video_area", SIZE_MULTIPLE * SIZE_MULTIPLE, MAX_AREA),
            index.text("audio_prompt", (TAGS, LABEL)),
            index.integer("skip_block", 0, blocks - 1),
            blocks,
        )


@dataclass(frozen=True)
class GuidanceScales:
    """Guidance scales of the prompt, per modality."""

    video_guidance_scale: float = 4.0
    audio_guidance_scale: float = 3.0


#: For pages. The number of blocks is that of all published checkpoints.
FIELDS = (
    *fusion_fields(GuidanceScales, height=DEFAULT_HEIGHT, width=DEFAULT_WIDTH, seed=DEFAULT_SEED, multiple=1),
    RequestField(
        "slg_layer",
        "int",
        SKIP_BLOCK,
        0,
        OVI_TRANSFORMER_CONFIG["video"]["num_layers"] - 1,
        is_option=True,
        help="block that the negative branch omits; 0 for none",
    ),
    RequestField("uncond_skip_layers", "text", is_option=True, help="several such blocks instead, such as 10,11"),
    RequestField(
        "slg_start", "float", 0.0, 0.0, 1.0, is_option=True, help="first step with omitted blocks, as a fraction"
    ),
    RequestField("slg_stop", "float", 1.0, 0.0, 1.0, is_option=True, help="end of the steps with omitted blocks"),
)


@dataclass(frozen=True, kw_only=True)
class OviRequest(FusionRequest):
    """One checked request.

    Attributes:
        prompt: in the format of the checkpoint, with ``<S>..<E>`` around speech.
        image: the first frame, not decoded; None to generate from text only.
        skip_layers: blocks omitted in the branch with the negative prompts.
    """

    image: Any = None
    skip_layers: SkipLayers = SkipLayers((SKIP_BLOCK,))
    scales: GuidanceScales = field(default_factory=GuidanceScales)


def parse_request(prompt: Any, sampling: Any, lengths: LatentLengths, model: CheckpointOptions) -> OviRequest:
    """Check a request without decoding its image; :func:`size_for_image` sets the size if there is an image.

    Args:
        prompt: text, or ``{"prompt": text, "multi_modal_data": {"image": image}}``, the format of vLLM-Omni, or with
            ``"timeline_guides": [{"frame_index": 0, "image": image}]``.
        sampling: ``OmniDiffusionSamplingParams``. Its ``extra_args`` hold the options of
            :func:`~port_kit.models.wan.pipeline.request.parse_common`, the fields of :class:`GuidanceScales` and
            ``slg_layer``, and those of :mod:`~port_kit.pipeline.skip_layers`. Height and width give the aspect ratio.
        lengths: of the clip.
        model: options of the checkpoint.

    Raises:
        InputError: a field has an invalid value, or does not exist.
    """
    fields = prompt_fields(prompt)
    common = parse_common(fields, sampling, lengths, scales=GuidanceScales, seed=DEFAULT_SEED)
    height, width = _ratio(sampling)
    height, width = size_for_area(height, width, model.video_area)
    skip_layers = parse_skip_layers(
        sampling.extra_args or {}, name="slg_layer", default=model.skip_block, layers=model.blocks
    )
    common["prompt"] = format_prompt(common["prompt"], model.audio_prompt)
    return OviRequest(
        **common,
        height=height,
        width=width,
        image=_image(media_of(fields, MEDIA), lengths.frames),
        skip_layers=skip_layers,
    )


def _ratio(sampling: Any) -> tuple[int, int]:
    """Return height and width, both or none. They are scaled later, so they need not be multiples of 32."""
    given = {name: getattr(sampling, name) for name in ("height", "width") if getattr(sampling, name) is not None}
    if len(given) == 1:
        (name,) = given
        raise InputError(
            f"only {name} is given; height and width set the aspect ratio together",
            code="input_missing",
            hint="give height and width, or neither",
        )
    sides = [check_integer(name, value, minimum=1, maximum=MAX_SIDE) for name, value in given.items()]
    return (sides[0], sides[1]) if sides else (DEFAULT_HEIGHT, DEFAULT_WIDTH)


def _image(media: Mapping[str, Any], frames: int) -> Any:
    images, audios, guides = (as_list(media.get(kind)) for kind in MEDIA)
    images += [first_frame_of(guide, frames) for guide in guides]
    if len(images) > 1:
        raise InputError(f"{len(images)} images; at most one, the first frame, is accepted", code="input_count")
    if audios:
        raise InputError(
            f"{len(audios)} audio(s); this model accepts none",
            code="input_count",
            hint="describe the audio in the prompt",
        )
    return images[0] if images else None


def format_prompt(prompt: str, audio_prompt: str) -> str:
    """Convert the description of audio in a prompt to the format of the checkpoint."""
    if audio_prompt == TAGS:
        return _LABELLED.sub(lambda heard: f"<AUDCAP>{heard[1]}<ENDAUDCAP>", prompt)
    return _TAGGED.sub(lambda heard: f"Audio: {heard[1]}", prompt)


def size_for_area(height: int, width: int, area: int) -> tuple[int, int]:
    """Scale a size to an area with its aspect ratio, then round each side to the nearest multiple of 32 pixels.

    Raises:
        InputError: a side would be longer than :data:`MAX_SIDE`.
    """
    scale = math.sqrt(area / (height * width))
    cells = [max(1, round(round(side * scale) / SIZE_MULTIPLE)) for side in (height, width)]
    return _checked(cells[0] * SIZE_MULTIPLE, cells[1] * SIZE_MULTIPLE, height, width)


def size_for_image(height: int, width: int, area: int) -> tuple[int, int]:
    """Return the size in multiples of 32 pixels that is nearest to the area, then to the image's aspect ratio.

    The candidates are those of the original: seven numbers of rows around the ideal one, with the number of columns for
    the aspect ratio, and each side scaled separately.

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
    """Raise InputError if a request's height and width differ from the aspect ratio of the image."""
    if sampling.height is None:
        return
    given, found = sampling.width / sampling.height, width / height
    if abs(given / found - 1) > RATIO_TOLERANCE:
        raise InputError(
            f"height and width are {sampling.height} and {sampling.width}, the image is {height}x{width}; "
            "the aspect ratios must be equal",
            code="input_size",
            hint="omit height and width, or crop the image",
        )


def keeps_size(sampling: Any, height: int, width: int, area: int) -> bool:
    """Return True if a request asks for exactly the size of its image, and the checkpoint makes that size.

    The last frame of a video then continues it in its size, to which :func:`size_for_image` may prefer another one.
    """
    cell = SIZE_MULTIPLE
    near = (height - cell) * (width - cell) <= area <= (height + cell) * (width + cell)
    exact = height % cell == 0 and width % cell == 0
    return (sampling.height, sampling.width) == (height, width) and exact and near


def _checked(height: int, width: int, given_height: int, given_width: int) -> tuple[int, int]:
    if max(height, width) > MAX_SIDE:
        raise InputError(
            f"a height of {given_height} and a width of {given_width} give a video of {height}x{width}; "
            f"sides may have at most {MAX_SIDE} pixels",
            code="input_size",
            hint="use an aspect ratio closer to 1",
        )
    return height, width
