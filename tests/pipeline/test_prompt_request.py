"""Plain prompt requests: defaults, limits, and errors by code."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from vllm_omni.inputs.data import OmniDiffusionSamplingParams

from port_kit.errors import InputError
from port_kit.pipeline.prompt_pipeline import FlowEuler
from port_kit.pipeline.prompt_request import GuidanceScale, PromptOptions, PromptRequest, parse_prompt_request

OPTIONS = PromptOptions(
    steps=8, min_steps=2, guidance_scale=3.0, height=64, width=96, size_multiple=16, frames=17, frame_step=8, seed=5
)
IMAGES = PromptOptions(steps=8, guidance_scale=3.0, height=64, width=96, size_multiple=16, max_outputs=1)


def parse(prompt: Any = "a crab", options: PromptOptions = OPTIONS, **sampling: Any) -> PromptRequest:
    return parse_prompt_request(prompt, OmniDiffusionSamplingParams(**sampling), options)


def test_defaults_are_the_ports() -> None:
    assert parse() == PromptRequest(
        prompt="a crab",
        negative_prompt="",
        height=64,
        width=96,
        frames=17,
        steps=8,
        scales=GuidanceScale(3.0),
        seed=5,
    )
    assert parse(options=IMAGES).frames == 1


def test_what_a_request_gives_is_used() -> None:
    sampling = {"height": 32, "width": 48, "num_frames": 9, "num_inference_steps": 4, "seed": 7}
    found = parse(
        {"prompt": "a crab", "negative_prompt": "sand"},
        **sampling,
        guidance_scale=1.5,
        guidance_scale_provided=True,
        num_outputs_per_prompt=2,
    )
    assert (found.negative_prompt, found.height, found.width, found.frames) == ("sand", 32, 48, 9)
    assert (found.steps, found.seed, found.scales.guidance_scale, found.outputs) == (4, 7, 1.5, 2)


@pytest.mark.parametrize(
    ("prompt", "sampling", "code"),
    [
        ("", {}, "input_missing"),
        ({"prompt": 3}, {}, "input_type"),
        ({"prompt": "a", "negative_prompt": 3}, {}, "input_type"),
        ({"prompt": "a", "multi_modal_data": {"image": ["a.png"]}}, {}, "input_count"),
        ("a", {"height": 40}, "input_size"),
        ("a", {"num_frames": 10}, "input_size"),
        ("a", {"num_inference_steps": 1}, "input_value"),
        ("a", {"num_outputs_per_prompt": 11}, "input_value"),
        ("a", {"seed": 2**63}, "input_value"),
    ],
)
def test_an_invalid_request_is_refused(prompt: Any, sampling: dict[str, Any], code: str) -> None:
    with pytest.raises(InputError) as caught:
        parse(prompt, **sampling)
    assert caught.value.code == code


@pytest.mark.parametrize("sampling", [{"num_frames": 9}, {"num_outputs_per_prompt": 2}])
def test_a_model_of_single_images_refuses_more(sampling: dict[str, Any]) -> None:
    with pytest.raises(InputError) as caught:
        parse(options=IMAGES, **sampling)
    assert caught.value.code == "input_value"


def test_euler_steps_follow_a_straight_flow_from_noise_to_data() -> None:
    data, noise = torch.full((3,), 2.0), torch.tensor([0.5, -1.0, 4.0])
    solver = FlowEuler(4)
    assert solver.timesteps.tolist() == [1.0, 0.75, 0.5, 0.25]
    latents = noise
    for time in solver.timesteps:
        (latents,) = solver.step((noise - data).bfloat16(), time, latents)
    assert latents.dtype == torch.float32
    assert np.allclose(latents.numpy(), data.numpy())
