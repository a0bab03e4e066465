"""Pipeline of a port with prompt requests, whose transformer predicts a flow."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor

from port_kit.pipeline.base import PortPipeline
from port_kit.pipeline.images import resize_image
from port_kit.pipeline.prompt_request import GuidanceScale, PromptOptions, parse_prompt_request
from port_kit.pipeline.request_state import PreparedRequest, Solver

#: Sides of the output of a dummy run, in multiples of ``size_multiple``.
DUMMY_CELLS = 16
#: Longest audio of a dummy run, in seconds.
DUMMY_SECONDS = 1.0


class PromptPipeline(PortPipeline):
    """A pipeline with two guidance branches, with the prompt and with the negative prompt, and Euler steps.

    A port implements ``encode``, ``initial_latents``, ``branches`` and ``decode``.

    Attributes:
        options: defaults and limits of requests.
    """

    options: PromptOptions
    default_num_inference_steps: ClassVar[int]
    dummy_run_num_frames: ClassVar[int]
    support_image_input: ClassVar[bool] = False

    def __init_subclass__(cls, **others: Any) -> None:
        """Derive what vLLM-Omni reads of the class from :attr:`options`."""
        super().__init_subclass__(**others)
        if "options" in vars(cls):
            cls.support_image_input = cls.options.images > 0
            cls.default_num_inference_steps = cls.options.steps
            cls.dummy_run_num_frames = 1 if cls.options.frames == 1 else 1 + cls.options.frame_step

    def prepare(self, prompt: Any, sampling: Any, *, is_dummy_run: bool = False) -> PreparedRequest:
        """Check a request, and resize its reference images to the size of the output.

        A dummy run is at most :data:`DUMMY_CELLS` multiples of the size, or :data:`DUMMY_SECONDS`.

        Raises:
            InputError: the request cannot be served.
        """
        if is_dummy_run:  # vLLM-Omni gives every dummy request a size, which the model may not support
            sampling = replace(sampling, height=None, width=None)
        if is_dummy_run and self.options.images > 1:  # vLLM-Omni gives every dummy request one image
            prompt = {
                **prompt,
                "multi_modal_data": {"image": [prompt["multi_modal_data"]["image"]] * self.options.images},
            }
        request = parse_prompt_request(prompt, sampling, self.options)
        if is_dummy_run:
            request = replace(request, seconds=min(request.seconds, DUMMY_SECONDS))
            limit = DUMMY_CELLS * self.options.size_multiple
            request = replace(request, height=min(request.height, limit), width=min(request.width, limit))
        images = tuple(self.fit_image(image, request.height, request.width) for image in request.images)
        return PreparedRequest(replace(request, images=()), images=images)

    def fit_image(self, image: Image.Image, height: int, width: int) -> Tensor:
        """Return a reference image in the size of the output, float32 (3, H, W) in [-1, 1]."""
        return resize_image(image, height, width)

    def build_solver(self, request: Any) -> Solver:
        """Return Euler steps from time 1 to time 0."""
        return FlowEuler(request.steps)

    def combine_multi_branch_cfg_noise(
        self, predictions: list[Any], true_cfg_scale: Any, cfg_normalize: bool = False
    ) -> Any:
        """Guide by the prompt.

        Args:
            predictions: of both branches.
            true_cfg_scale: :class:`~port_kit.pipeline.prompt_request.GuidanceScale` as a dict.
            cfg_normalize: as vLLM-Omni's mixin has it.
        """
        scale = GuidanceScale(**true_cfg_scale).guidance_scale
        return super().combine_multi_branch_cfg_noise(predictions, scale, cfg_normalize)


class FlowEuler:
    """Euler steps along the flow ``noise - data``.

    Attributes:
        timesteps: (steps,), times of the steps: from 1, which is noise, down to 1 / steps.
    """

    def __init__(self, steps: int) -> None:
        self.timesteps = torch.tensor([1 - index / steps for index in range(steps)])

    def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        """Return the sample after the step, in its own dtype."""
        return (sample - model_output.to(sample.dtype) / len(self.timesteps),)
