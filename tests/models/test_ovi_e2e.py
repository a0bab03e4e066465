"""Ovi end to end: the reference engine's trajectories from text and from a first frame, refused requests, guidance."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from vllm_omni.diffusion.request import DUMMY_DIFFUSION_REQUEST_ID, OmniDiffusionRequest
from vllm_omni.diffusion.worker.request_batch import DiffusionRequestBatch
from vllm_omni.inputs.data import OmniDiffusionSamplingParams

from port_kit.models.ovi import PORT
from port_kit.models.ovi.config import GuidanceScales
from port_kit.models.ovi.pipeline import OviPipeline
from port_kit.models.wan.parity.pipeline_cases import ovi_cases, run_e2e
from port_kit.models.wan.parity.recorded_runs import OVI_I2V, OVI_T2V, RecordedRun
from port_kit.models.wan.pipeline.fusion_pipeline import FusionPipeline
from port_kit.parity import Case, run_case
from port_kit.pipeline.loading import load_pipeline
from port_kit.pipeline.request_state import PreparedRequest
from port_kit.registry import find_port
from port_kit.runtime.single_process import single_rank


@pytest.fixture(scope="module")
def pipeline(ovi_model: Path) -> Iterator[OviPipeline]:
    """The tiny pipeline, loaded by the standard loader."""
    with single_rank(torch.float32):
        yield load_pipeline(ovi_model)


def request(media: dict[str, Any] | None = None, request_id: str = "test", **sampling: Any) -> DiffusionRequestBatch:
    """A small request of one step."""
    fields = {"num_inference_steps": 1, "seed": 5, **sampling}
    prompt = {"prompt": sampling.pop("prompt", "rain on a roof"), "multi_modal_data": media or {}}
    fields.pop("prompt", None)
    return DiffusionRequestBatch([OmniDiffusionRequest(prompt, OmniDiffusionSamplingParams(**fields), request_id)])


def prepare(pipeline: FusionPipeline, batch: DiffusionRequestBatch) -> PreparedRequest:
    """Prepare the only request of a batch."""
    return pipeline.prepare(batch.prompts[0], batch.sampling_params)


def test_the_port_is_found_and_declares_its_pipeline() -> None:
    assert find_port("ovi") == PORT
    assert PORT.class_name == OviPipeline.__name__
    assert [component.name for component in PORT.components] == [
        *OviPipeline._dit_modules,
        *OviPipeline._encoder_modules,
        *OviPipeline._vae_modules,
    ]


@pytest.mark.parametrize("run", [OVI_T2V, OVI_I2V], ids=lambda run: run.folder)
def test_latents_video_and_audio_match_the_reference_engine(goldens: Path, run: RecordedRun) -> None:
    report = run_case(Case(f"{run.folder} fp32", lambda: run_e2e(goldens, "fp32", run)))
    assert report.ok, report.to_json()
    names = [difference.name for difference in report.differences]
    assert names[-2:] == ["video.frames", "audio.wave"]
    assert sum("latent_after" in name for name in names) == 4
    assert ("pixels_to_vae.0" in names) == (run is OVI_I2V)


def test_the_ports_cases_are_its_runs_and_all_that_it_shares(goldens: Path) -> None:
    names = [case.name for case in ovi_cases(goldens)]
    assert names[-2:] == ["e2e_ovi_t2v fp32", "e2e_ovi_i2v fp32"]
    assert {"umt5 fp32", "wan_vae fp32", "mmaudio fp32", "fusion/ovi_slg fp32", "fusion/rope fp32"} <= set(names)


def test_a_first_frame_stays_and_its_image_gives_the_size(pipeline: OviPipeline) -> None:
    with torch.inference_mode():
        prepared = prepare(pipeline, request({"image": Image.new("RGB", (300, 150), (200, 30, 90))}))
        assert (prepared.request.height, prepared.request.width) == (32, 96)
        (state,) = pipeline.begin(prepared)
        first = state.conditioning.images
        assert first.shape == (1, 48, 1, 2, 6)
        positive, negative = pipeline.branches(state)
        assert (positive["first_frame_clean"], positive["skip_layers"], negative["skip_layers"]) == (True, (), (1,))
        assert torch.equal(positive["video"][:, :, :1], first)
        pipeline.scheduler_step(
            state, (torch.ones_like(state.latents["video"]), torch.ones_like(state.latents["audio"]))
        )
        assert torch.equal(state.latents["video"][:, :, :1], first) and state.is_done


def test_text_alone_has_no_clean_frame_and_skips_a_block_only_on_request(pipeline: OviPipeline) -> None:
    with torch.inference_mode():
        (state,) = pipeline.begin(prepare(pipeline, request(extra_args={"slg_layer": 0})))
        assert state.latents["video"].shape == (1, 48, 31, 2, 6)
        assert [(b["first_frame_clean"], b["skip_layers"]) for b in pipeline.branches(state)] == [(False, ())] * 2


def test_official_options_choose_the_skipped_blocks_and_the_steps(pipeline: OviPipeline) -> None:
    options = {"uncond_skip_layers": [0, 2], "slg_start": 0.5}
    with torch.inference_mode():
        (state,) = pipeline.begin(prepare(pipeline, request(extra_args=options, num_inference_steps=2)))
        flows = tuple(map(torch.ones_like, state.latents.values()))
        omitted = []
        while not state.is_done:
            omitted.append([branch["skip_layers"] for branch in pipeline.branches(state)])
            pipeline.scheduler_step(state, flows)
    assert omitted == [[(), ()], [(), (0, 2)]]


def test_the_start_up_run_is_short(pipeline: OviPipeline) -> None:
    media = {"image": Image.new("RGB", (512, 512))}
    fields = {"num_frames": pipeline.dummy_run_num_frames, "height": 512, "width": 512}
    result = pipeline.forward(request(media, DUMMY_DIFFUSION_REQUEST_ID, **fields))
    assert result.error is None
    assert result.output["video"].shape == (5, 64, 64, 3)


@pytest.mark.parametrize(
    ("media", "sampling", "code", "name"),
    [
        ({"image": [b"corrupt"]}, {}, "input_unreadable", "image"),
        ({"image": Image.new("RGB", (64, 64))}, {"height": 64, "width": 128}, "input_size", "64x64"),
        ({"image": [3]}, {}, "input_type", "image is int"),
        ({}, {"num_inference_steps": 0}, "input_value", "num_inference_steps is 0"),
        ({}, {"extra_args": {"slg_layer": 3}}, "input_value", "slg_layer"),
        ({}, {"extra_args": {"video_noise": torch.zeros(1)}}, "input_size", "(48, 31, 2, 6)"),
        ({}, {"prompt": "many words " * 300}, "input_too_long", "512"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_bad_request_is_a_clients_error_before_any_model_runs(
    pipeline: OviPipeline,
    monkeypatch: pytest.MonkeyPatch,
    media: dict[str, Any],
    sampling: dict[str, Any],
    code: str,
    name: str,
) -> None:
    ran: list[PreparedRequest] = []
    monkeypatch.setattr(pipeline, "generate", ran.append)
    result = pipeline.forward(request(media, **sampling))
    assert not ran
    assert result.output is None
    assert f"[{code}]" in result.error and name in result.error
    assert (result.error_status_code, result.error_type) == (400, "BadRequestError")


def test_guidance_pushes_each_modality_by_its_own_scale() -> None:
    positive, negative = ((torch.tensor(video), torch.tensor(audio)) for video, audio in ((5, 7), (1, 2)))
    combine = OviPipeline.combine_multi_branch_cfg_noise
    video, audio = combine(None, [positive, negative], dataclasses.asdict(GuidanceScales()))  # type: ignore[arg-type]
    assert video == 1 + 4.0 * (5 - 1)
    assert audio == 2 + 3.0 * (7 - 2)
