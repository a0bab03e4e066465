"""DreamID-Omni on vLLM-Omni: reference images, reference audios, a prompt, four-branch guidance, video with audio.

Shapes: C latent channels, F latent frames with the reference images last, h and w latent cells (16 pixels),
L audio latents with the reference audios last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm_omni.diffusion.models.interface import SupportAudioInput, SupportImageInput

from port_kit.models.dreamid_omni import config
from port_kit.models.dreamid_omni.weights import COMPONENTS
from port_kit.models.wan.pipeline.conditioning_media import crop_reference_audio, load_reference_audio
from port_kit.models.wan.pipeline.fusion_pipeline import FusionPipeline
from port_kit.models.wan.pipeline.prompts import strip_tags
from port_kit.models.wan.pipeline.request import LatentLengths
from port_kit.models.wan.transformer.modality_io import TextContext
from port_kit.pipeline.images import fit_image, load_image
from port_kit.pipeline.request_state import DenoiseState
from port_kit.port import Component


class DreamIDOmniPipeline(FusionPipeline, SupportImageInput, SupportAudioInput):
    """Pipeline whose reference images and reference audios follow the latents of the output.

    The transformer sees clean references. The solvers step noise in their places, as the original implementation
    does; that noise is dropped before decoding.
    """

    components: ClassVar[tuple[Component, ...]] = COMPONENTS
    support_image_input: ClassVar[bool] = True
    support_audio_input: ClassVar[bool] = True

    def preprocess(
        self, prompt: Any, sampling: Any, lengths: LatentLengths
    ) -> tuple[config.DreamIDOmniRequest, Sequence[Tensor], Sequence[Tensor]]:
        """Return the checked request, its images (3, H, W) in [-1, 1] and its reference audios (16000,), float32.

        Raises:
            InputError: the request cannot be served.
        """
        request = config.parse_request(prompt, sampling, lengths)
        decoded = [load_image(image, name=f"image {i}") for i, image in enumerate(request.images, 1)]
        samples = [
            load_reference_audio(audio, name=f"reference audio {i}") for i, audio in enumerate(request.audios, 1)
        ]
        images = [fit_image(image, request.height, request.width) for image in decoded]
        audios = [crop_reference_audio(audio, name=f"reference audio {i}") for i, audio in enumerate(samples, 1)]
        return replace(request, prompt=strip_tags(request.prompt)), images, audios

    def branches(self, state: DenoiseState) -> list[dict[str, Any]]:
        """Return the four branches of a step: complete; without the text; without the images; without the audios.

        References that a branch omits are zeros at the same positions. Of the last two branches only the modality
        without references is used.
        """
        given = state.conditioning
        frames, tokens = given.images.shape[2], given.audios.shape[1]

        def arguments(
            images: Tensor, audios: Tensor, texts: tuple[TextContext, TextContext], unused: str | None = None
        ) -> dict[str, Any]:
            return {
                "video": torch.cat((state.latents["video"][:, :, :-frames], images), dim=2),
                "audio": torch.cat((state.latents["audio"][:, :-tokens], audios), dim=1),
                "timestep": state.timestep,
                "video_text": texts[0],
                "audio_text": texts[1],
                "video_reference_frames": frames,
                "audio_reference_lengths": given.audio_reference_lengths,
                "unused": unused,
            }

        return [
            arguments(given.images, given.audios, given.texts),
            arguments(given.images, given.audios, given.negatives),
            arguments(torch.zeros_like(given.images), given.audios, given.texts, unused="audio"),
            arguments(given.images, torch.zeros_like(given.audios), given.texts, unused="video"),
        ]

    def combine_multi_branch_cfg_noise(
        self, predictions: list[Any], true_cfg_scale: Any, cfg_normalize: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Guide each modality by the text and by its own references.

        Args:
            predictions: (video, audio) of the four branches, in the order of :meth:`branches`.
            true_cfg_scale: :class:`~port_kit.models.dreamid_omni.config.GuidanceScales` as a dict.
            cfg_normalize: not used by this model.
        """
        full, no_text, no_images, no_audios = predictions
        scale = config.GuidanceScales(**true_cfg_scale)
        return (
            _guide(full[0], no_text[0], no_images[0], scale.video_cfg_scale, scale.video_ref_cfg_scale),
            _guide(full[1], no_text[1], no_audios[1], scale.audio_cfg_scale, scale.audio_ref_cfg_scale),
        )


def _guide(full: Tensor, no_text: Tensor, no_reference: Tensor, text_scale: float, reference_scale: float) -> Tensor:
    return no_text + text_scale * (full - no_text) + reference_scale * (full - no_reference)
