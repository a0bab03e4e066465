"""Requests of DreamID-Omni: options, defaults, and the error of each mistake."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from vllm_omni.inputs.data import OmniDiffusionSamplingParams

from port_kit.errors import InputError
from port_kit.models.dreamid_omni import PORT, config
from port_kit.models.dreamid_omni.config import DreamIDOmniRequest, GuidanceScales, parse_request
from port_kit.models.dreamid_omni.pipeline import DreamIDOmniPipeline
from port_kit.models.wan.pipeline.request import LatentLengths
from port_kit.pipeline.admission import admit
from tests.helpers import raises

LENGTHS = LatentLengths(31, 157)


def parse(
    prompt: Any = "a talk", *, image: Any = ("a.png",), audio: Any = ("a.wav",), **sampling: Any
) -> DreamIDOmniRequest:
    """Parse a valid request with changes."""
    fields = {"prompt": prompt, "multi_modal_data": {"image": image, "audio": audio}}
    given = OmniDiffusionSamplingParams(**sampling)
    pipeline = DreamIDOmniPipeline
    admit(fields, given, PORT, fps=24, tensors=pipeline.tensor_options, reasons=pipeline.not_read)
    return parse_request(fields, given, LENGTHS)


def test_a_request_that_says_nothing_gets_the_original_defaults() -> None:
    request = parse()
    assert (request.height, request.width, request.steps, request.shift) == (704, 1280, 50, 5.0)
    assert (request.solver, request.seed) == ("unipc", 100)
    assert request.scales == GuidanceScales(3.0, 1.5, 4.0, 2.0)
    assert request.video_negative_prompt == "jitter, bad hands, blur, distortion"
    assert request.audio_negative_prompt == "robotic, muffled, echo, distorted"


def test_the_clip_is_121_frames_and_its_noise_holds_the_references_places() -> None:
    assert LENGTHS.frames == 121
    request = parse(image=["a", "b"], audio=["c", "d"], height=64, width=96)
    assert request.noise_shapes(LENGTHS) == ((48, 33, 4, 6), (219, 20))


def test_options_travel_in_extra_args_and_negative_prompts_also_in_the_prompt() -> None:
    request = parse(
        extra_args={"video_cfg_scale": 2, "shift": 3.5, "solver_name": "euler", "audio_negative_prompt": "noise"},
        num_inference_steps=8,
        seed=7,
    )
    assert (request.scales.video_cfg_scale, request.shift, request.solver, request.steps) == (2.0, 3.5, "euler", 8)
    assert (request.audio_negative_prompt, request.seed) == ("noise", 7)
    fields = {"prompt": "p", "negative_prompt": "blur", "multi_modal_data": {"image": "a.png", "audio": "a.wav"}}
    assert parse_request(fields, OmniDiffusionSamplingParams(), LENGTHS).video_negative_prompt == "blur"


def test_guidance_scale_applies_to_the_video_if_a_request_sets_it() -> None:
    assert parse(guidance_scale=1.0).scales.video_cfg_scale == 3.0
    assert parse(guidance_scale=2.5, guidance_scale_provided=True).scales.video_cfg_scale == 2.5


def test_one_reference_need_not_be_a_list_and_a_waveform_with_its_rate_is_one() -> None:
    request = parse(image="a.png", audio=([0.0], 16000))
    assert (request.images, request.audios) == (("a.png",), (([0.0], 16000),))


@pytest.mark.parametrize(
    ("change", "code", "name"),
    [
        ({"image": None}, "input_missing", "image"),
        ({"image": []}, "input_missing", "image"),
        ({"audio": None}, "input_missing", "audio"),
        ({"image": ["a", "b"]}, "input_count", "2"),
        ({"image": ["a"] * 28, "audio": ["b"] * 28}, "input_count", str(config.MAX_REFERENCES)),
        ({"prompt": ""}, "input_missing", "prompt"),
        ({"prompt": " \n"}, "input_missing", "prompt"),
        ({"prompt": None}, "input_type", "NoneType"),
        ({"prompt": ["a"]}, "input_type", "list"),
        ({"prompt": "x" * 10_000}, "input_too_long", "10000"),
        ({"height": 100}, "input_size", "height is 100"),
        ({"width": 720}, "input_size", "704 or 736"),
        ({"height": 0}, "input_value", "height is 0"),
        ({"width": -64}, "input_value", "width is -64"),
        ({"height": 1 << 20}, "input_value", "4096"),
        ({"height": 64.0}, "input_type", "height is 64.0"),
        ({"height": 4096, "width": 4096}, "input_size", "at most 1843200 pixels"),
        ({"num_inference_steps": 1001}, "input_value", "num_inference_steps is 1001"),
        ({"num_inference_steps": 0}, "input_value", "num_inference_steps is 0"),
        ({"num_inference_steps": -3}, "input_value", "num_inference_steps is -3"),
        ({"num_inference_steps": "many"}, "input_type", "'many'"),
        ({"num_inference_steps": True}, "input_type", "True"),
        ({"num_frames": 61}, "input_value", "121"),
        ({"fps": 30}, "input_value", "24"),
        ({"num_outputs_per_prompt": 11}, "input_value", "num_outputs_per_prompt is 11"),
        ({"seed": "x"}, "input_type", "seed"),
        ({"seed": -1}, "input_value", "seed is -1"),
        ({"extra_args": {"shift": 0.0}}, "input_value", "shift is 0.0"),
        ({"extra_args": {"shift": float("nan")}}, "input_value", "shift"),
        ({"extra_args": {"video_cfg_scale": float("inf")}}, "input_value", "video_cfg_scale is inf"),
        ({"extra_args": {"audio_ref_cfg_scale": "2"}}, "input_type", "audio_ref_cfg_scale"),
        ({"extra_args": {"video_cfg_scal": 2.0}}, "input_value", "video_cfg_scale"),
        *[({"extra_args": {"shift": shift}}, "input_value", "0.01 or more") for shift in (1e-320, 1e308, 10**400)],
        *[({"extra_args": {"video_cfg_scale": scale}}, "input_value", "100") for scale in (1e30, -1e308, 101)],
        ({"extra_args": {"shift": 3.0, "flow_shift": 4.0}}, "input_value", "they set the same"),
        ({"extra_args": {"solver_name": "heun"}}, "input_value", "unipc, dpm++, euler"),
        ({"extra_args": {"video_negative_prompt": 3}}, "input_type", "video_negative_prompt is int"),
        ({"extra_args": {"audio_negative_prompt": "x" * 9000}}, "input_too_long", "audio_negative_prompt"),
        ({"extra_args": {"video_noise": 1.0}}, "input_size", "video_noise is float"),
    ],
    ids=lambda value: None if isinstance(value, dict) else str(value)[:30],
)
def test_each_mistake_is_named(change: dict[str, Any], code: str, name: str) -> None:
    with raises(code) as caught:
        parse(**change)
    assert name in str(caught.value)  # of the message or the hint


def test_the_nominal_duration_is_taken_as_servers_send_it() -> None:
    parse(extra_args={"duration": 5.0, "generate_sound": True}, num_frames=120)
    with raises("input_value", "duration is 4.0"):
        parse(extra_args={"duration": 4.0})
    with raises("input_value", "num_frames is 120"):
        parse(num_frames=120)


@pytest.mark.parametrize("prompt", ["plain text", {"prompt": "p"}, {"prompt": "p", "multi_modal_data": None}])
def test_a_prompt_without_references_is_refused(prompt: Any) -> None:
    with raises("input_missing"):
        parse_request(prompt, OmniDiffusionSamplingParams(), LENGTHS)


def test_references_must_be_in_a_mapping() -> None:
    with raises("input_type", "multi_modal_data", "list"):
        parse_request({"prompt": "p", "multi_modal_data": ["a"]}, OmniDiffusionSamplingParams(), LENGTHS)


LONG = 10**5000
STRANGE = {
    "array": np.zeros(3),
    "tensor": torch.zeros(3),
    "scalar": torch.tensor(3),
    "arrays": [np.zeros(3)],
    "mapping": {"a": torch.zeros(2)},
    "object": object(),
    "deep": [[[[[[1]]]]]],
    "long": LONG,
    "longs": [LONG],
    "text": "x" * 10**6,
    "bytes": b"x" * 10**6,
}


@pytest.mark.parametrize("kind", STRANGE)
def test_a_strange_value_is_named_in_a_short_message(kind: str) -> None:
    value = STRANGE[kind]
    changes: list[dict[str, Any]] = [
        {name: value} for name in ("seed", "height", "num_frames", "fps", "guidance_scale_2", "latents")
    ]
    changes.append({"guidance_scale": value, "guidance_scale_provided": True})
    changes += [{"extra_args": {name: value}} for name in (*(PORT.option_names or ()), "nonsense")]
    changes += [
        {"extra_args": {value if isinstance(value, (int, str, bytes)) else "nonsense": 1}},
        {"extra_args": value},
    ]
    for change in changes:
        with pytest.raises(InputError) as caught:
            parse(**change)
        assert len(caught.value.message) < 400, change


@pytest.mark.parametrize(
    "noise",
    [
        np.zeros((48, 32, 4, 4)),
        torch.zeros(48, 32, 4, 4, dtype=torch.int32),
        torch.zeros(48, 32, 4, 4, device="meta"),
        torch.full((48, 32, 4, 4), float("nan")),
    ],
)
def test_noise_is_a_finite_tensor_of_floats(noise: Any) -> None:
    with pytest.raises(InputError, match="video_noise"):
        parse(height=64, width=64, extra_args={"video_noise": noise})
    given = torch.zeros(48, 32, 4, 4)
    assert parse(height=64, width=64, extra_args={"video_noise": given}).video_noise is given


def test_half_of_a_character_is_refused() -> None:
    with raises("input_value", "prompt", "at 4"):
        parse("rain\ud800")
    with raises("input_value", "audio_negative_prompt"):
        parse(extra_args={"audio_negative_prompt": "\udfff"})
    assert parse("\U0001f327").prompt == "\U0001f327"


def test_numbers_of_numpy_are_numbers() -> None:
    request = parse(seed=np.int64(7), extra_args={"shift": np.float32(3.5), "video_cfg_scale": np.int32(2)})
    assert (request.seed, request.shift, request.scales.video_cfg_scale) == (7, 3.5, 2.0)
