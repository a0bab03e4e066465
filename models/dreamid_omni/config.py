"""What a DreamID-Omni request may set, with the original's defaults and their units."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from port_kit.errors import InputError
from port_kit.models.wan.pipeline.request import (
    MAX_SIDE,
    SIZE_MULTIPLE,
    FusionRequest,
    Lengths,
    media_of,
    parse_common,
    prompt_fields,
)
from port_kit.pipeline.inputs import as_list, check_size

VIDEO_LATENT_LENGTH = 31  # latent frames: 1 + 30 * 4 = 121 frames
AUDIO_LATENT_LENGTH = 157  # audio latents: 314 mel frames of 256 samples = 80,384 samples
GUIDANCE_BRANCHES = 4  # of the transformer, a step: full, without text, without pictures, without voices
#: Latents that one voice reference takes: 1 s = 16,000 samples = 62 mel frames = 31 latents.
VOICE_LATENT_LENGTH = 31
#: The audio tower reads at most 1024 tokens, references included.
MAX_REFERENCES = (1024 - AUDIO_LATENT_LENGTH) // VOICE_LATENT_LENGTH

DEFAULT_HEIGHT, DEFAULT_WIDTH = 704, 1280  # pixels
DEFAULT_SEED = 100


@dataclass(frozen=True)
class GuidanceScales:
    """How far a prediction is pushed, per modality: towards the text, and towards the references."""

    video_cfg_scale: float = 3.0
    video_ref_cfg_scale: float = 1.5
    audio_cfg_scale: float = 4.0
    audio_ref_cfg_scale: float = 2.0


@dataclass(frozen=True, kw_only=True)
class GenerationRequest(FusionRequest):
    """One checked request. References are still as the caller gave them.

    Attributes:
        prompt: may hold the model's markers (``<img1>``, ``<sub1>``, ``<S>..<E>``) and ``[TAG]`` blocks.
        images: reference pictures, one a person.
        voices: reference voices, the i-th is the i-th picture's.
    """

    images: tuple[Any, ...]
    voices: tuple[Any, ...]
    scales: GuidanceScales = field(default_factory=GuidanceScales)

    @property
    def reference_lengths(self) -> Lengths:
        """One latent frame a picture, :data:`VOICE_LATENT_LENGTH` audio latents a voice."""
        return Lengths(len(self.images), len(self.voices) * VOICE_LATENT_LENGTH)


def parse_request(prompt: Any, sampling: Any, lengths: Lengths) -> GenerationRequest:
    """Check a request completely, references' contents aside.

    Args:
        prompt: ``{"prompt": text, "multi_modal_data": {"image": [...], "audio": [...]}}``, as vLLM-Omni takes it.
        sampling: ``OmniDiffusionSamplingParams``. Its ``extra_args`` hold the options of
            :func:`~port_kit.models.wan.pipeline.request.parse_common` and the fields of :class:`GuidanceScales`.
        lengths: of the clip that the model makes.

    Raises:
        InputError: with what was given, what is required and what to do.
    """
    fields = prompt_fields(prompt)
    common = parse_common(fields, sampling, lengths, scales=GuidanceScales, options=(), seed=DEFAULT_SEED)
    images, voices = _references(media_of(fields))
    height, width = check_size(
        DEFAULT_HEIGHT if sampling.height is None else sampling.height,
        DEFAULT_WIDTH if sampling.width is None else sampling.width,
        multiple=SIZE_MULTIPLE,
        maximum=MAX_SIDE,
    )
    request = GenerationRequest(**common, height=height, width=width, images=images, voices=voices)
    request.check_noise(lengths)
    return request


def _references(data: Mapping[str, Any]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    images, voices = tuple(as_list(data.get("image"))), tuple(as_list(data.get("audio")))
    for what, found in (("picture", images), ("voice", voices)):
        if not found:
            raise InputError(
                f"the request has no reference {what}; at least one picture and one voice are required",
                code="input_missing",
                hint='give them as multi_modal_data={"image": [...], "audio": [...]}, to a server as input_references',
            )
    if len(images) != len(voices):
        raise InputError(
            f"{len(images)} reference picture(s) and {len(voices)} voice(s); as many voices as pictures are required",
            code="input_count",
            hint="the i-th voice belongs to the i-th picture",
        )
    if len(images) > MAX_REFERENCES:
        raise InputError(f"{len(images)} references; at most {MAX_REFERENCES} are taken", code="input_count")
    return images, voices
