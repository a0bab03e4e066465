"""Plain prompt requests: defaults, limits, and errors by code."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from vllm_omni.inputs.data import OmniDiffusionSamplingParams

from port_kit.errors import InputError
from port_kit.pipeline.prompt_pipeline import FlowEuler, PromptPipeline
from port_kit.pipeline.prompt_request import GuidanceScale, PromptOptions, PromptRequest, parse_prompt_request
from tests.helpers import raises

OPTIONS = PromptOptions(
    steps=8, min_steps=2, guidance_scale=3.0, height=64, width=96, size_multiple=16, frames=17, frame_step=8, seed=5
)
AUDIO = PromptOptions(steps=8, guidance_scale=3.0, seconds=4.0, max_seconds=10.0)
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


@pytest.mark.parametrize(
    ("extra", "seconds"),
    [
        ({}, 4.0),
        ({"audio_length": 2}, 2.0),
        ({"audio_start_in_s": 0.0, "audio_end_in_s": 2.5}, 2.5),
        ({"audio_length": 2.5, "audio_start_in_s": 0.0, "audio_end_in_s": 2.5}, 2.5),
    ],
)
def test_the_length_of_audio_is_that_of_the_request(extra: dict[str, Any], seconds: float) -> None:
    found = parse(options=AUDIO, extra_args=extra)
    assert (found.seconds, found.height, found.width, found.frames) == (seconds, 0, 0, 1)


@pytest.mark.parametrize(
    ("sampling", "name"),
    [
        ({"extra_args": {"audio_length": 11}}, "audio_length"),
        ({"extra_args": {"audio_length": -1.0}}, "audio_length"),
        ({"extra_args": {"audio_start_in_s": 1.0, "audio_end_in_s": 3.0}}, "audio_start_in_s"),
        ({"height": 64}, "height"),
        ({"num_frames": 9}, "num_frames"),
    ],
)
def test_what_audio_does_not_have_is_refused(sampling: dict[str, Any], name: str) -> None:
    with raises("input_value", name):
        parse(options=AUDIO, **sampling)


def test_the_seed_may_come_as_a_generator() -> None:
    assert parse(generator=torch.Generator().manual_seed(9)).seed == 9
    with raises("input_value", "seed"):
        parse(generator=torch.Generator().manual_seed(-1))


@pytest.mark.parametrize("sizes", [{}, {"height": 64}, {"height": 64, "width": 64, "seconds": 1.0}])
def test_a_port_has_a_size_or_a_length(sizes: dict[str, Any]) -> None:
    with raises("port_invalid", "seconds"):
        PromptOptions(steps=8, guidance_scale=3.0, **sizes)


def test_euler_steps_follow_a_straight_flow_from_noise_to_data() -> None:
    data, noise = torch.full((3,), 2.0), torch.tensor([0.5, -1.0, 4.0])
    solver = FlowEuler(4)
    assert solver.timesteps.tolist() == [1.0, 0.75, 0.5, 0.25]
    latents = noise
    for time in solver.timesteps:
        (latents,) = solver.step((noise - data).bfloat16(), time, latents)
    assert latents.dtype == torch.float32
    assert np.allclose(latents.numpy(), data.numpy())


EDITS = PromptOptions(steps=8, guidance_scale=3.0, height=64, width=96, size_multiple=16, max_side=128, images=1)


def edit(*images: Any, **sampling: Any) -> PromptRequest:
    """Parse a request with reference images."""
    return parse({"prompt": "a crab", "multi_modal_data": {"image": list(images)}}, EDITS, **sampling)


@pytest.mark.parametrize(
    ("size", "sampling", "expected"),
    [
        ((50, 70), {}, (64, 48)),
        ((300, 150), {}, (64, 128)),
        ((3, 3), {}, (16, 16)),
        ((50, 70), {"height": 32, "width": 16}, (32, 16)),
    ],
)
def test_the_output_has_the_size_of_the_first_image(
    size: tuple[int, int], sampling: dict[str, Any], expected: tuple[int, int]
) -> None:
    found = edit(Image.new("RGBA", size), **sampling)
    assert (found.height, found.width) == expected
    (image,) = found.images
    assert (image.mode, image.size) == ("RGB", size)


def test_reference_images_are_counted() -> None:
    with raises("input_count", "takes 1"):
        parse("a crab", EDITS)
    with raises("input_count", "2 of 'image'"):
        edit(Image.new("RGB", (8, 8)), Image.new("RGB", (8, 8)))
    with raises("input_count", "1 of 'audio'"):
        parse({"prompt": "a", "multi_modal_data": {"audio": [np.zeros(9, np.float32)]}}, EDITS)
    with raises("input_count", "takes no"):
        parse({"prompt": "a", "multi_modal_data": {"image": [Image.new("RGB", (8, 8))]}}, IMAGES)
    with raises("input_type", "image 1"):
        edit(np.zeros((4, 4), np.uint8))


def test_a_dummy_run_has_a_size_that_the_model_supports() -> None:
    """vLLM-Omni asks for 512x512, whatever the model makes."""
    small = PromptOptions(steps=2, guidance_scale=3.0, height=96, width=128, size_multiple=8, max_side=128)

    class Small(PromptPipeline):
        options = small

    Small.__abstractmethods__ = frozenset()  # only requests are prepared
    pipeline = Small.__new__(Small)
    sampling = OmniDiffusionSamplingParams(height=512, width=512, num_inference_steps=1)
    request = pipeline.prepare("dummy run", sampling, is_dummy_run=True).request
    assert (request.height, request.width) == (96, 128)
    with pytest.raises(InputError, match="height is 512"):
        pipeline.prepare("a picture", sampling)
