"""Options of DreamID-Omni requests, with the original's defaults and their units."""

from __future__ import annotations

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
from port_kit.pipeline.inputs import as_list, check_size

VIDEO_LATENT_LENGTH = 31  # latent frames: 1 + 30 * 4 = 121 frames
AUDIO_LATENT_LENGTH = 157  # audio latents: 314 mel frames of 256 samples = 80,384 samples
#: Number of latents of a reference audio: 1 s = 16,000 samples = 62 mel frames = 31 latents.
AUDIO_REFERENCE_LENGTH = 31
#: The audio tower supports at most 1024 tokens, references included.
MAX_REFERENCES = (1024 - AUDIO_LATENT_LENGTH) // AUDIO_REFERENCE_LENGTH

DEFAULT_HEIGHT, DEFAULT_WIDTH = 704, 1280  # pixels
DEFAULT_SEED = 100


@dataclass(frozen=True)
class GuidanceScales:
    """Guidance scales of the text and of the references, per modality."""

    video_cfg_scale: float = 3.0
    video_ref_cfg_scale: float = 1.5
    audio_cfg_scale: float = 4.0
    audio_ref_cfg_scale: float = 2.0


#: For pages.
FIELDS = fusion_fields(GuidanceScales, height=DEFAULT_HEIGHT, width=DEFAULT_WIDTH, seed=DEFAULT_SEED)


@dataclass(frozen=True, kw_only=True)
class DreamIDOmniRequest(FusionRequest):
    """One checked request. References are not decoded.

    Attributes:
        prompt: may contain the model's markers (``<img1>``, ``<sub1>``, ``<S>..<E>``) and ``[TAG]`` blocks.
        images: reference images, one per person.
        audios: reference audio of each person, in the order of the images.
    """

    images: tuple[Any, ...]
    audios: tuple[Any, ...]
    scales: GuidanceScales = field(default_factory=GuidanceScales)

    @property
    def reference_lengths(self) -> LatentLengths:
        """One latent frame per image, :data:`AUDIO_REFERENCE_LENGTH` audio latents per reference audio."""
        return LatentLengths(len(self.images), len(self.audios) * AUDIO_REFERENCE_LENGTH)


def parse_request(prompt: Any, sampling: Any, lengths: LatentLengths) -> DreamIDOmniRequest:
    """Check a request without decoding its references.

    Args:
        prompt: ``{"prompt": text, "multi_modal_data": {"image": [...], "audio": [...]}}``, the format of vLLM-Omni.
        sampling: ``OmniDiffusionSamplingParams``. Its ``extra_args`` hold the options of
            :func:`~port_kit.models.wan.pipeline.request.parse_common` and the fields of :class:`GuidanceScales`.
        lengths: of the clip.

    Raises:
        InputError: a field has an invalid value, or does not exist.
    """
    fields = prompt_fields(prompt)
    common = parse_common(fields, sampling, lengths, scales=GuidanceScales, seed=DEFAULT_SEED)
    images, audios = _references(media_of(fields))
    height, width = check_size(
        DEFAULT_HEIGHT if sampling.height is None else sampling.height,
        DEFAULT_WIDTH if sampling.width is None else sampling.width,
        multiple=SIZE_MULTIPLE,
        maximum=MAX_SIDE,
        area=MAX_AREA,
    )
    request = DreamIDOmniRequest(**common, height=height, width=width, images=images, audios=audios)
    request.check_noise(lengths)
    return request


def _references(data: Mapping[str, Any]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    images, audios = tuple(as_list(data.get("image"))), tuple(as_list(data.get("audio")))
    for kind, found in (("image", images), ("audio", audios)):
        if not found:
            raise InputError(
                f"the request has no reference {kind}; at least one image and one reference audio are required",
                code="input_missing",
                hint='give them as multi_modal_data={"image": [...], "audio": [...]}, to a server as input_references',
            )
    if len(images) != len(audios):
        raise InputError(
            f"{len(images)} reference image(s) and {len(audios)} reference audio(s); equal numbers are required",
            code="input_count",
            hint="the i-th reference audio belongs to the i-th image",
        )
    if len(images) > MAX_REFERENCES:
        raise InputError(f"{len(images)} references; at most {MAX_REFERENCES} are supported", code="input_count")
    return images, audios
