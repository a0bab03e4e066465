"""Ovi on vLLM-Omni: a prompt and an optional first frame to a video with audio.

Shapes: C latent channels, F latent frames, h and w latent cells (16 pixels), L audio latents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm_omni.diffusion.models.interface import SupportImageInput

from port_kit.models.ovi import config
from port_kit.models.ovi.weights import COMPONENTS
from port_kit.models.wan.pipeline.fusion_pipeline import EncodedConditioning, FusionPipeline
from port_kit.models.wan.pipeline.request import LatentLengths
from port_kit.models.wan.transformer.config import FusionConfig
from port_kit.models.wan.transformer.modality_io import TextContext
from port_kit.pipeline import skip_layers
from port_kit.pipeline.images import load_image, resize_image
from port_kit.pipeline.model_index import read_json
from port_kit.pipeline.request_state import DenoiseState
from port_kit.port import Component


class OviPipeline(FusionPipeline, SupportImageInput):
    """Pipeline that writes a given first frame into the latents before every step; its tokens have timestep 0.

    Attributes:
        model: options of the checkpoint.
    """

    components: ClassVar[tuple[Component, ...]] = COMPONENTS
    support_image_input: ClassVar[bool] = True
    not_read: ClassVar[Mapping[str, str]] = {**FusionPipeline.not_read, **skip_layers.NOT_READ}

    def read_directory(self, model: str) -> None:
        """Read the options of the checkpoint, too."""
        super().read_directory(model)
        transformer = FusionConfig.from_dict(read_json(model, "transformer/config.json"))
        self.options = config.CheckpointOptions.from_index(self.index, blocks=transformer.num_layers)

    def preprocess(
        self, prompt: Any, sampling: Any, lengths: LatentLengths
    ) -> tuple[config.OviRequest, Sequence[Tensor], Sequence[Tensor]]:
        """Return the checked request, its image (3, H, W) in [-1, 1] if it has one, and no audio.

        Raises:
            InputError: the request cannot be served.
        """
        request = config.parse_request(prompt, sampling, lengths, self.options)
        images: list[Tensor] = []
        if request.image is not None:
            image = load_image(request.image)
            config.check_ratio(sampling, image.height, image.width)
            height, width, area = image.height, image.width, self.options.video_area
            if not config.keeps_size(sampling, height, width, area):
                height, width = config.size_for_image(height, width, area)
            request = replace(request, height=height, width=width)
            images = [resize_image(image, height, width)]
        request.check_noise(lengths)
        return request, images, ()

    def reapply_conditioning(self, latents: dict[str, Tensor], conditioning: EncodedConditioning) -> dict[str, Tensor]:
        """Return the latents with the given first frame restored."""
        first, video = conditioning.images, latents["video"]
        return {**latents, "video": torch.cat((first, video[:, :, first.shape[2] :]), dim=2)}

    def branches(self, state: DenoiseState) -> list[dict[str, Any]]:
        """Return the two branches of a step: with the prompt; with the negative prompts and omitted blocks."""
        given, request = state.conditioning, state.prepared.request

        def arguments(texts: tuple[TextContext, TextContext], omitted: tuple[int, ...]) -> dict[str, Any]:
            return {
                "video": state.latents["video"],
                "audio": state.latents["audio"],
                "timestep": state.timestep,
                "video_text": texts[0],
                "audio_text": texts[1],
                "first_frame_clean": given.images.shape[2] > 0,
                "skip_layers": omitted,
            }

        omitted = request.skip_layers.at(state.index, len(state.timesteps))
        return [arguments(given.texts, ()), arguments(given.negatives, omitted)]

    def combine_multi_branch_cfg_noise(
        self, predictions: list[Any], true_cfg_scale: Any, cfg_normalize: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Guide each modality by the text with its own scale.

        Args:
            predictions: (video, audio) of both branches, in the order of :meth:`branches`.
            true_cfg_scale: :class:`~port_kit.models.ovi.config.GuidanceScales` as a dict.
            cfg_normalize: not used by this model.
        """
        scales = config.GuidanceScales(**true_cfg_scale)
        video, audio = (
            negative + scale * (positive - negative)
            for positive, negative, scale in zip(
                *predictions, (scales.video_guidance_scale, scales.audio_guidance_scale), strict=True
            )
        )
        return video, audio
