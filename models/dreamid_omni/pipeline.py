"""DreamID-Omni on vLLM-Omni: reference pictures and voices, a prompt, four-branch guidance, video with sound.

Shapes: C latent channels, F latent frames with the reference pictures last, h and w latent cells (16 pixels),
L audio latents with the reference voices last.
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
from port_kit.models.wan.pipeline.conditioning_media import cut_voice, fit_image, load_image, load_voice
from port_kit.models.wan.pipeline.fusion_pipeline import FusionPipeline, admission, get_post_process_func
from port_kit.models.wan.pipeline.prompts import strip_tags
from port_kit.models.wan.pipeline.request import Lengths
from port_kit.models.wan.pipeline.request_state import Denoising
from port_kit.models.wan.transformer.modality_io import TextContext
from port_kit.port import Component

__all__ = ["DreamIDOmniPipeline", "get_post_process_func", "get_pre_process_func"]


class DreamIDOmniPipeline(FusionPipeline, SupportImageInput, SupportAudioInput):
    """Pictures and voices of people stand behind the clip's own latents, clean in what the transformer sees.

    What the solvers step holds noise in the references' places, as in the reference; it is dropped at the end.
    """

    components: ClassVar[tuple[Component, ...]] = COMPONENTS
    guidance_branches: ClassVar[int] = config.GUIDANCE_BRANCHES
    support_image_input: ClassVar[bool] = True
    support_audio_input: ClassVar[bool] = True

    def read(
        self, prompt: Any, sampling: Any, lengths: Lengths
    ) -> tuple[config.GenerationRequest, Sequence[Tensor], Sequence[Tensor]]:
        """Return the checked request, its pictures (3, H, W) in [-1, 1] and its voices (16000,), float32.

        Raises:
            InputError: the request cannot be served.
        """
        request = config.parse_request(prompt, sampling, lengths)
        images = [load_image(image, name=f"picture {i}") for i, image in enumerate(request.images, 1)]
        sounds = [(load_voice(voice, name=f"voice {i}"), f"voice {i}") for i, voice in enumerate(request.voices, 1)]
        pictures = [fit_image(image, request.height, request.width) for image in images]
        voices = [cut_voice(samples, name=name) for samples, name in sounds]
        return replace(request, prompt=strip_tags(request.prompt)), pictures, voices

    def branches(self, state: Denoising) -> list[dict[str, Any]]:
        """Return the four passes of a step: full; without the text; without the pictures; without the voices.

        References that a pass goes without are zeroed, not removed: they keep their places and positions. Of the
        last two passes only the modality whose references are missing is used.
        """
        given = state.conditions
        frames, tokens = given.pictures.shape[2], given.voices.shape[1]

        def put(
            pictures: Tensor, voices: Tensor, texts: tuple[TextContext, TextContext], unused: str | None = None
        ) -> dict[str, Any]:
            return {
                "video": torch.cat((state.video[:, :, :-frames], pictures), dim=2),
                "audio": torch.cat((state.audio[:, :-tokens], voices), dim=1),
                "timestep": state.timestep,
                "video_text": texts[0],
                "audio_text": texts[1],
                "video_reference_frames": frames,
                "audio_reference_lengths": given.voice_lengths,
                "unused": unused,
            }

        return [
            put(given.pictures, given.voices, given.texts),
            put(given.pictures, given.voices, given.negatives),
            put(torch.zeros_like(given.pictures), given.voices, given.texts, unused="audio"),
            put(given.pictures, torch.zeros_like(given.voices), given.texts, unused="video"),
        ]

    def combine_multi_branch_cfg_noise(
        self, predictions: list[Any], true_cfg_scale: Any, cfg_normalize: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Guide each modality by the text and by its own references.

        Args:
            predictions: (video, audio) of the four passes, in the order of :meth:`branches`.
            true_cfg_scale: :class:`~port_kit.models.dreamid_omni.config.GuidanceScales` as a dict.
            cfg_normalize: not used by this model.
        """
        full, no_text, no_pictures, no_voices = predictions
        scale = config.GuidanceScales(**true_cfg_scale)
        return (
            _guide(full[0], no_text[0], no_pictures[0], scale.video_cfg_scale, scale.video_ref_cfg_scale),
            _guide(full[1], no_text[1], no_voices[1], scale.audio_cfg_scale, scale.audio_ref_cfg_scale),
        )


def _guide(full: Tensor, no_text: Tensor, no_reference: Tensor, text_scale: float, reference_scale: float) -> Tensor:
    return no_text + text_scale * (full - no_text) + reference_scale * (full - no_reference)


get_pre_process_func = admission(DreamIDOmniPipeline)
