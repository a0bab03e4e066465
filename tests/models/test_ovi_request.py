"""Requests of Ovi: options, the size of the video, and the error of each mistake."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from vllm_omni.inputs.data import OmniDiffusionSamplingParams

from port_kit.cli.download import load_recipe
from port_kit.errors import DownloadError
from port_kit.models.ovi import PORT
from port_kit.models.ovi.config import (
    LABEL,
    TAGS,
    VARIANTS,
    CheckpointOptions,
    GuidanceScales,
    OviRequest,
    check_ratio,
    format_prompt,
    keeps_size,
    parse_request,
    size_for_area,
    size_for_image,
)
from port_kit.models.ovi.pipeline import OviPipeline
from port_kit.models.ovi.recipe import recipe
from port_kit.models.wan.pipeline.request import LatentLengths
from port_kit.pipeline.admission import admit
from port_kit.pipeline.model_index import ModelIndex
from port_kit.pipeline.skip_layers import SkipLayers
from tests.helpers import raises

LENGTHS = LatentLengths(31, 157)
MODEL = CheckpointOptions(video_area=720 * 720, audio_prompt=TAGS, skip_block=11, blocks=30)


def parse(prompt: Any = "a street", *, image: Any = None, **sampling: Any) -> OviRequest:
    """Parse a valid request with changes."""
    fields = {"prompt": prompt, "multi_modal_data": {"image": image}} if image is not None else prompt
    given = OmniDiffusionSamplingParams(**sampling)
    admit(fields, given, PORT, fps=24, reasons=OviPipeline.not_read)
    return parse_request(fields, given, LENGTHS, MODEL)


def test_a_request_that_says_nothing_gets_the_original_defaults() -> None:
    request = parse()
    assert (request.height, request.width, request.steps, request.shift) == (512, 992, 50, 5.0)
    assert (request.solver, request.seed, request.skip_layers, request.image) == ("unipc", 103, SkipLayers((11,)), None)
    assert request.scales == GuidanceScales(4.0, 3.0)
    assert request.video_negative_prompt == "jitter, bad hands, blur, distortion"
    assert request.audio_negative_prompt == "robotic, muffled, echo, distorted"


def test_options_travel_in_extra_args() -> None:
    request = parse(
        extra_args={"audio_guidance_scale": 2, "slg_layer": 0}, guidance_scale=6, guidance_scale_provided=True
    )
    assert (request.scales, request.skip_layers) == (GuidanceScales(6.0, 2.0), SkipLayers(()))


@pytest.mark.parametrize(
    ("given", "area", "made"),
    [
        ((512, 992), 720 * 720, (512, 992)),
        ((1080, 1920), 720 * 720, (544, 960)),
        ((1080, 1920), 960 * 960, (704, 1280)),
        ((1920, 1080), 960 * 960, (1280, 704)),
        ((64, 64), 960 * 960, (960, 960)),
        ((1, 2000), 720 * 720, None),
    ],
)
def test_height_and_width_give_the_ratio_and_the_checkpoint_the_area(
    given: tuple[int, int], area: int, made: tuple[int, int] | None
) -> None:
    if made is None:
        with raises("input_size", "2000"):
            size_for_area(*given, area)
    else:
        assert size_for_area(*given, area) == made


@pytest.mark.parametrize(
    ("image", "area", "made"),
    [
        ((50, 130), 64 * 64, (32, 96)),  # the recorded run's image
        ((736, 1424), 960 * 960, (704, 1344)),
        ((720, 720), 720 * 720, (704, 704)),
        ((1000, 1000), 960 * 960, (960, 960)),
    ],
)
def test_an_image_gives_the_ratio(image: tuple[int, int], area: int, made: tuple[int, int]) -> None:
    assert size_for_image(*image, area) == made


@pytest.mark.parametrize("area", [64 * 64, 720 * 720, 960 * 960])
def test_a_frame_of_a_video_continues_it_in_its_size(area: int) -> None:
    for height, width in itertools.product(range(256, 1921, 104), repeat=2):
        for made in (size_for_area(height, width, area), size_for_image(height, width, area)):
            assert keeps_size(OmniDiffusionSamplingParams(height=made[0], width=made[1]), *made, area)
    assert size_for_image(64, 96, 64 * 64) == (64, 64), "the size of a video that an image alone does not give"
    for size, given in (((1080, 1920), (1080, 1920)), ((704, 704), (None, None)), ((2048, 2048), (2048, 2048))):
        assert not keeps_size(OmniDiffusionSamplingParams(height=given[0], width=given[1]), *size, 720 * 720)


def test_a_size_beside_an_image_must_have_its_ratio() -> None:
    check_ratio(OmniDiffusionSamplingParams(height=512, width=992), 768, 1488)
    check_ratio(OmniDiffusionSamplingParams(), 768, 768)
    with raises("input_size", "512", "992", "768x768"):
        check_ratio(OmniDiffusionSamplingParams(height=512, width=992), 768, 768)


@pytest.mark.parametrize(
    ("prompt", "tagged", "labelled"),
    [
        ("Rain. Audio: drops,\nwind.", "Rain. <AUDCAP>drops,\nwind.<ENDAUDCAP>", "Rain. Audio: drops,\nwind."),
        ("Rain. <AUDCAP>drops<ENDAUDCAP>", "Rain. <AUDCAP>drops<ENDAUDCAP>", "Rain. Audio: drops"),
        ("Rain, <S>hello<E>.", "Rain, <S>hello<E>.", "Rain, <S>hello<E>."),
    ],
)
def test_the_audio_description_gets_the_checkpoints_format(prompt: str, tagged: str, labelled: str) -> None:
    assert format_prompt(prompt, TAGS) == tagged
    assert format_prompt(prompt, LABEL) == labelled
    assert parse(prompt).prompt == tagged


@pytest.mark.parametrize(
    ("change", "code", "name"),
    [
        ({"prompt": ""}, "input_missing", "prompt"),
        ({"prompt": 3}, "input_type", "prompt is int"),
        ({"image": ["a", "b"]}, "input_count", "2 images"),
        ({"height": 512}, "input_missing", "height"),
        ({"width": 512}, "input_missing", "width"),
        ({"height": 0, "width": 512}, "input_value", "height is 0"),
        ({"height": 512, "width": 1 << 20}, "input_value", "width is 1048576"),
        ({"num_inference_steps": 0}, "input_value", "num_inference_steps is 0"),
        ({"num_frames": 241}, "input_value", "121"),
        ({"num_outputs_per_prompt": 0}, "input_value", "num_outputs_per_prompt is 0"),
        ({"extra_args": {"slg_layer": 30}}, "input_value", "slg_layer"),
        ({"extra_args": {"slg_layer": -1}}, "input_value", "slg_layer is -1"),
        ({"extra_args": {"slg_scale": 2.5}}, "input_value", "uncond_skip_layers selects"),
        ({"extra_args": {"slg_skip_layers": [7]}}, "input_value", "slg_skip_layers is [7]"),
        ({"extra_args": {"slg_layr": 3}}, "input_value", "slg_layer"),
        ({"extra_args": {"video_guidance_scale": float("nan")}}, "input_value", "video_guidance_scale"),
        ({"extra_args": {"audio_guidance_scale": "3"}}, "input_type", "audio_guidance_scale"),
    ],
    ids=lambda value: None if isinstance(value, dict) else str(value)[:30],
)
def test_each_mistake_is_named(change: dict[str, Any], code: str, name: str) -> None:
    with raises(code) as caught:
        parse(**change)
    assert name in str(caught.value)  # of the message or the hint


@pytest.mark.parametrize("index", [0, -LENGTHS.frames])
def test_a_timeline_guide_at_the_first_frame_is_the_image(index: int) -> None:
    fields = {"prompt": "p", "multi_modal_data": {"timeline_guides": [{"frame_index": index, "image": "a.png"}]}}
    assert parse(fields).image == "a.png"


@pytest.mark.parametrize(
    ("guides", "more", "code", "name"),
    [
        ([{"frame_index": 120, "image": "a"}], {}, "input_value", "frame_index 120"),
        ([{"frame_index": -1, "image": "a"}], {}, "input_value", "frame_index -1"),
        ([{"frame_index": 121, "image": "a"}], {}, "input_value", "frame_index is 121"),
        ([{"image": "a"}], {}, "input_type", "frame_index"),
        ([{"frame_index": 0, "video": "a.mp4"}], {}, "input_value", "video"),
        ([{"frame_index": 0, "image": "a", "audio": "a.wav"}], {}, "input_value", "image and audio"),
        ([{"frame_index": 0}], {}, "input_value", "no media"),
        ([{"frame_index": 0, "image": "a"}, {"frame_index": 0, "image": "b"}], {}, "input_count", "2 images"),
        ([{"frame_index": 0, "image": "a"}], {"image": "b"}, "input_count", "2 images"),
    ],
)
def test_other_timeline_guides_are_refused(
    guides: list[dict[str, Any]], more: dict[str, Any], code: str, name: str
) -> None:
    with raises(code, name):
        parse({"prompt": "p", "multi_modal_data": {"timeline_guides": guides, **more}})


def test_reference_audio_is_refused() -> None:
    fields = {"prompt": "p", "multi_modal_data": {"audio": ["a.wav"]}}
    with raises("input_count", "1 audio"):
        parse_request(fields, OmniDiffusionSamplingParams(), LENGTHS, MODEL)


@pytest.mark.parametrize("name", list(VARIANTS))
def test_a_variant_is_a_file_an_area_a_length_and_a_form_of_prompts(name: str) -> None:
    given, made = VARIANTS[name], recipe(name)
    assert made.repositories[0].files[0].pattern == given.file
    assert made.repositories[0].files[0].target(given.file) == "transformer/model.safetensors"
    model = CheckpointOptions.from_index(ModelIndex(Path("model_index.json"), made.model_index), blocks=30)
    assert (model.video_area, model.audio_prompt, model.skip_block) == (given.video_area, given.audio_prompt, 11)
    seconds = 10 if name.endswith("10s") else 5
    assert given.lengths.frames == 1 + 24 * seconds
    assert f"{round(given.video_area**0.5)}x" in name


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[("video_area", value) for value in (None, -5, 0, True, "big", 5e5, float("nan"), 1 << 40, [1])],
        *[("audio_prompt", value) for value in (None, "", "tag", 3, ["tags"])],
        *[("skip_block", value) for value in (None, -1, 30, "11", 1.0)],
    ],
)
def test_a_wrong_value_of_the_index_is_named_with_its_file(key: str, value: object) -> None:
    values = {"video_area": 720 * 720, "audio_prompt": TAGS, "skip_block": 11, key: value}
    if value is None:
        del values[key]
    with raises("model_incomplete", "some/model_index.json", key):
        CheckpointOptions.from_index(ModelIndex(Path("some/model_index.json"), values), blocks=30)


def test_a_variant_is_chosen_by_name() -> None:
    assert load_recipe("ovi") == load_recipe("ovi", "720x720_5s") == recipe("720x720_5s")
    assert load_recipe("ovi", "960x960_10s") == recipe("960x960_10s")
    with pytest.raises(DownloadError) as caught:
        load_recipe("ovi", "1080p")
    assert (caught.value.code, caught.value.hint) == ("recipe_invalid", f"use one of {', '.join(VARIANTS)}")
    with raises("recipe_invalid", "dreamid_omni", "720x720_5s"):
        load_recipe("dreamid_omni", "720x720_5s")
