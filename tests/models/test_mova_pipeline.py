"""MOVA's pipeline with its tiny model: requests, the first frame, the change of the video tower, guidance, outputs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from vllm_omni.diffusion.request import DUMMY_DIFFUSION_REQUEST_ID, OmniDiffusionRequest
from vllm_omni.diffusion.worker.request_batch import DiffusionRequestBatch
from vllm_omni.inputs.data import OmniDiffusionSamplingParams

from port_kit.models.mova import PORT
from port_kit.models.mova.model.scheduler import FlowEuler, Schedule
from port_kit.models.mova.pipeline import MOVAPipeline
from port_kit.models.mova.recipe import RECIPE_360P
from port_kit.parallel.cfg_batching import EXPERT
from port_kit.pipeline.images import crop_image
from port_kit.pipeline.loading import load_pipeline
from port_kit.pipeline.request_state import DenoiseState
from port_kit.registry import find_port
from port_kit.runtime.single_process import single_rank
from port_kit.testing.tiny_port import download_tiny
from tests.helpers import raises

IMAGE = Image.new("RGB", (300, 150), (200, 30, 90))
#: A request of 17 frames; at 24 fps its audio has 36 latents.
SMALL = {"height": 32, "width": 48, "num_frames": 17, "seed": 3}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, from a loopback Hub."""
    return Path(download_tiny(PORT, tmp_path_factory.mktemp("models") / "mova").directory)


@pytest.fixture(scope="module")
def pipeline(model: Path) -> Iterator[MOVAPipeline]:
    """The tiny pipeline, loaded by the standard loader."""
    with single_rank(torch.float32), torch.inference_mode():
        yield load_pipeline(model)


def request(request_id: str = "test", image: Any = IMAGE, **sampling: Any) -> DiffusionRequestBatch:
    """A small request of two steps, one per video tower."""
    if "guidance_scale" in sampling:
        sampling["guidance_scale_provided"] = True
    media = {} if image is None else {"image": image}
    fields = {**SMALL, "num_inference_steps": 2, **sampling}
    prompt = {"prompt": "rain on a roof", "multi_modal_data": media}
    return DiffusionRequestBatch([OmniDiffusionRequest(prompt, OmniDiffusionSamplingParams(**fields), request_id)])


def begin(pipeline: MOVAPipeline, **sampling: Any) -> DenoiseState:
    """Return the state of a request before its first step."""
    batch = request(**sampling)
    (state,) = pipeline.begin(pipeline.prepare(batch.prompts[0], batch.sampling_params))
    return state


def test_the_port_is_found_and_declares_its_modules() -> None:
    assert find_port("mova") == PORT
    assert PORT.class_name == MOVAPipeline.__name__
    assert MOVAPipeline._dit_modules == ["transformer", "transformer_2"]
    assert MOVAPipeline._resident_modules == ["audio_transformer", "bridge"]
    assert (MOVAPipeline._encoder_modules, MOVAPipeline._vae_modules) == (["text_encoder"], ["vae", "audio_vae"])


def test_both_checkpoints_are_one_repository_each() -> None:
    assert [repository.repo_id for repository in RECIPE_360P.repositories] == ["OpenMOSS-Team/MOVA-360p"]
    assert (RECIPE_360P.model_index["height"], RECIPE_360P.model_index["width"]) == (352, 640)


def test_a_request_has_the_defaults_of_the_original_and_of_its_directory(pipeline: MOVAPipeline) -> None:
    prompt = {"prompt": "rain", "multi_modal_data": {"image": IMAGE}}
    given = pipeline.prepare(prompt, OmniDiffusionSamplingParams(num_frames=5)).request
    assert (given.height, given.width, given.steps, given.seed) == (64, 96, 50, 42)
    assert given.scales.guidance_scale == 5.0 and given.negative_prompt.startswith("色调艳丽")
    assert pipeline.options.frames == 193


@pytest.mark.parametrize(("frames", "latents"), [(193, 403), (17, 36), (5, 11), (1, 3)], ids=lambda value: str(value))
def test_audio_is_as_long_as_the_video(frames: int, latents: int, pipeline: MOVAPipeline) -> None:
    assert pipeline.audio_length(frames) == latents


def test_the_first_frame_is_in_further_channels_of_every_step(pipeline: MOVAPipeline) -> None:
    state = begin(pipeline)
    given = state.conditioning.first_frame
    assert given.shape == (1, 20, 5, 4, 6) and given.dtype == torch.float32
    assert given[:, :4, 0].eq(1).all() and given[:, :4, 1:].eq(0).all()
    clip = torch.zeros(1, 3, 17, 32, 48)
    clip[:, :, 0] = crop_image(IMAGE, 32, 48)
    assert torch.equal(given[:, 4:], pipeline.vae.encode(clip))
    for _ in range(2):
        positive, negative = pipeline.branches(state)
        for branch in (positive, negative):
            assert torch.equal(branch["video"], torch.cat((state.latents["video"], given), 1))
        assert positive["audio_text"] is not negative["audio_text"]
        pipeline.scheduler_step(state, tuple(map(torch.ones_like, state.latents.values())))
    assert state.is_done


@pytest.mark.parametrize(("width", "height"), [(300, 150), (90, 210), (96, 64)])
def test_a_first_frame_is_cropped_in_its_center(width: int, height: int) -> None:
    image = Image.new("RGB", (width, height), (0, 0, 0))
    image.paste((255, 255, 255), (width // 2 - 2, 0, width // 2 + 2, height))
    pixels = crop_image(image, 32, 48)
    assert pixels.shape == (3, 32, 48) and pixels.min() >= -1 and pixels.max() <= 1
    assert abs(int(pixels.mean((0, 1)).argmax()) - 23.5) <= 1


def test_the_second_tower_takes_over_below_the_boundary(pipeline: MOVAPipeline) -> None:
    assert pipeline.experts.boundary == 900.0
    state = begin(pipeline, num_inference_steps=4)
    names, texts = [], []
    while not state.is_done:
        branches = pipeline.branches(state)
        assert len({branch[EXPERT] for branch in branches}) == 1
        names.append(branches[0][EXPERT])
        texts.append(branches[0]["video_text"])
        pipeline.scheduler_step(state, tuple(map(torch.ones_like, state.latents.values())))
    assert names == ["transformer"] * 2 + ["transformer_2"] * 2
    assert texts[0] is texts[1] and texts[1] is not texts[2] and texts[2] is texts[3]
    assert list(state.conditioning.positive.video.kept) == ["transformer_2"], "projections of the first tower are kept"


def test_the_tower_of_a_step_computes_it(pipeline: MOVAPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    for name in ("transformer", "transformer_2"):
        module = getattr(pipeline, name)

        def watched(*args: Any, _name: str = name, _forward: Any = module.forward, **options: Any) -> Any:
            ran.append(_name)
            return _forward(*args, **options)

        monkeypatch.setattr(module, "forward", watched)
    assert pipeline.forward(request()).error is None
    assert ran == ["transformer"] * 2 + ["transformer_2"] * 2


def test_the_towers_have_weights_of_their_own_and_share_the_rest(pipeline: MOVAPipeline) -> None:
    first, second = pipeline.transformer, pipeline.transformer_2
    assert not torch.equal(first.blocks[0].ffn.up.weight, second.blocks[0].ffn.up.weight)
    assert first.partner.audio is second.partner.audio is pipeline.audio_transformer
    assert first.partner.bridge is pipeline.bridge
    names = {name for name, _ in first.named_modules()}
    assert not any("partner" in name for name in names), "the shared modules belong to the pipeline"


def test_guidance_is_one_scale_for_both_and_none_at_one(pipeline: MOVAPipeline) -> None:
    pairs = [(torch.full((1,), float(a)), torch.full((1,), float(b))) for a, b in ((5, 7), (1, 2))]
    video, audio = pipeline.combine_multi_branch_cfg_noise([*pairs], {"guidance_scale": 3.0})
    assert (video.item(), audio.item()) == (1 + 3 * 4, 2 + 3 * 5)
    state = begin(pipeline, guidance_scale=1.0)
    (branch,) = pipeline.branches(state)
    (guided,) = pipeline.predict([state])
    name = branch.pop(EXPERT)
    for flow, expected in zip(guided, getattr(pipeline, name)(**branch), strict=True):
        assert torch.equal(flow, expected)


def test_noise_is_drawn_once_for_both_in_float32(pipeline: MOVAPipeline) -> None:
    state = begin(pipeline)
    generator = torch.Generator().manual_seed(3)
    video = torch.randn(1, 16, 5, 4, 6, generator=generator)
    audio = torch.randn(1, 4, 36, generator=generator)
    assert torch.equal(state.latents["video"], video)
    assert torch.equal(state.latents["audio"], audio.transpose(1, 2))


def test_a_request_gives_frames_and_samples(pipeline: MOVAPipeline) -> None:
    result = pipeline.forward(request())
    assert result.error is None
    assert result.output["video"].shape == (17, 32, 48, 3) and result.output["video"].dtype == torch.uint8
    assert result.output["audio"].shape == (36 * 960,) and result.output["audio"].abs().max() <= 1


def test_the_start_up_run_is_short(pipeline: MOVAPipeline) -> None:
    fields = {"num_frames": pipeline.dummy_run_num_frames, "height": 512, "width": 512}
    result = pipeline.forward(request(DUMMY_DIFFUSION_REQUEST_ID, Image.new("RGB", (512, 512)), **fields))
    assert result.error is None and result.output["video"].shape[0] == 5


@pytest.mark.parametrize(
    ("image", "sampling", "code", "name"),
    [
        (None, {}, "input_count", "none"),
        ([IMAGE, IMAGE], {}, "input_count", "2 of 'image'"),
        (IMAGE, {"height": 360, "width": 640}, "input_size", "360"),
        (IMAGE, {"num_frames": 16}, "input_size", "16"),
        (IMAGE, {"num_frames": 1001}, "input_value", "385"),
        (b"corrupt", {}, "input_unreadable", "image"),
        (IMAGE, {"extra_args": {"boundary_ratio": 0.5}}, "input_value", "boundary_ratio"),
        (IMAGE, {"fps": 30}, "input_value", "fps"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_bad_request_is_a_clients_error_before_any_model_runs(
    image: Any, sampling: dict[str, Any], code: str, name: str, pipeline: MOVAPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[object] = []
    monkeypatch.setattr(pipeline, "generate", ran.append)
    result = pipeline.forward(request(image=image, **sampling))
    assert not ran and result.output is None
    assert f"[{code}]" in result.error and name in result.error


def test_a_schedule_needs_its_shift() -> None:
    with raises("config_invalid", "'shift'"):
        Schedule.from_dict({"num_train_timesteps": 1000})
    with raises("config_invalid", "reverse_sigmas"):
        Schedule.from_dict({"shift": 5.0, "reverse_sigmas": True})


def test_steps_go_between_the_nearest_training_levels() -> None:
    """For 50 steps the levels differ from those of the timesteps; they never rise and end at 0."""
    solver = FlowEuler(Schedule(5.0), 50)
    exact = solver.timesteps / 1000
    assert 1e-4 < (solver.sigmas[:-1] - exact).abs().max() < 3e-3
    assert (solver.sigmas.diff() <= 0).all() and solver.sigmas[-1] == 0
    assert sum(time >= 900 for time in solver.timesteps) == 18
    sample: Tensor = torch.zeros(1)
    for time in solver.timesteps:
        (sample,) = solver.step(torch.ones(1), time, sample)
    assert sample.item() == pytest.approx(-1.0, abs=1e-6)
