"""DreamID-Omni end to end: the reference engine's trajectory, refused requests, guidance, the interface's promises."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from vllm_omni.diffusion.request import DUMMY_DIFFUSION_REQUEST_ID, OmniDiffusionRequest
from vllm_omni.diffusion.worker.request_batch import DiffusionRequestBatch
from vllm_omni.inputs.data import OmniDiffusionSamplingParams

from port_kit.models.dreamid_omni import PORT
from port_kit.models.dreamid_omni.config import GuidanceScales
from port_kit.models.dreamid_omni.pipeline import DreamIDOmniPipeline
from port_kit.models.wan.parity.pipeline_cases import RunRecording, request_of, run_e2e
from port_kit.models.wan.pipeline.fusion_pipeline import FusionPipeline
from port_kit.parity import Case, run_case
from port_kit.pipeline.loading import load_pipeline
from port_kit.pipeline.request_state import PreparedRequest
from port_kit.registry import find_port
from port_kit.runtime.single_process import single_rank


@pytest.fixture(scope="module")
def pipeline(dreamid_model: Path) -> Iterator[DreamIDOmniPipeline]:
    """The tiny pipeline, loaded by the standard loader."""
    with single_rank(torch.float32):
        yield load_pipeline(dreamid_model)


@pytest.fixture(scope="module")
def recording(goldens: Path) -> RunRecording:
    """Inputs and outputs of the original engine."""
    return RunRecording.read(goldens / "e2e_dreamid")


def request(media: tuple[Any, Any], request_id: str = "test", **sampling: Any) -> DiffusionRequestBatch:
    """A small request of two steps."""
    fields = {"height": 64, "width": 96, "num_inference_steps": 2, "seed": 5, **sampling}
    prompt = {"prompt": "two people talk", "multi_modal_data": {"image": media[0], "audio": media[1]}}
    return DiffusionRequestBatch([OmniDiffusionRequest(prompt, OmniDiffusionSamplingParams(**fields), request_id)])


def prepare(pipeline: FusionPipeline, batch: DiffusionRequestBatch) -> PreparedRequest:
    """Prepare the only request of a batch."""
    return pipeline.prepare(batch.prompts[0], batch.sampling_params)


def test_the_port_is_found_and_declares_its_pipeline() -> None:
    assert find_port("dreamid_omni") == PORT
    assert [component.name for component in PORT.components] == [
        *DreamIDOmniPipeline._dit_modules,
        *DreamIDOmniPipeline._encoder_modules,
        *DreamIDOmniPipeline._vae_modules,
    ]
    assert PORT.class_name == DreamIDOmniPipeline.__name__


def test_every_step_video_and_audio_match_the_reference_engine(goldens: Path) -> None:
    report = run_case(Case("e2e_dreamid fp32", lambda: run_e2e(goldens)))
    assert report.ok, report.to_json()
    names = [difference.name for difference in report.differences]
    assert names[-2:] == ["video.frames", "audio.wave"]
    assert sum("latent_after" in name for name in names) == 4


def test_a_complete_request_gives_121_frames_and_audio(pipeline: DreamIDOmniPipeline, recording: RunRecording) -> None:
    output = pipeline.forward(request_of(recording)).output
    assert output["video"].shape == (121, 64, 96, 3) and output["video"].dtype == torch.uint8
    assert output["audio"].shape == (80_384,) and output["audio"].dtype == torch.float32
    expected = recording.tensors["video.frames"].permute(1, 2, 3, 0)
    frames = output["video"][recording.tensors["video.frames_index"]].float() / 127.5 - 1
    assert (frames - expected).abs().max() < 1 / 127 + 1e-4


def test_seeds_make_noise_that_is_the_same_again(pipeline: DreamIDOmniPipeline, recording: RunRecording) -> None:
    media = recording.media("image"), recording.media("audio")
    prepared = prepare(pipeline, request(media))
    first, again = pipeline.initial_latents(prepared), pipeline.initial_latents(prepared)
    assert all(torch.equal(first[name], again[name]) for name in first)
    other = pipeline.initial_latents(prepare(pipeline, request(media, seed=6)))
    assert not torch.equal(first["video"], other["video"])
    # One seed, one generator a modality: both begin with the same numbers.
    assert torch.allclose(first["video"].flatten()[:16], first["audio"].flatten()[:16])


def test_the_start_up_run_is_short(pipeline: DreamIDOmniPipeline) -> None:
    media = torch.randn(32_000).numpy()
    from PIL import Image

    batch = request(
        (Image.new("RGB", (512, 512)), media),
        DUMMY_DIFFUSION_REQUEST_ID,
        num_frames=pipeline.dummy_run_num_frames,
        guidance_scale=0.0,
        guidance_scale_provided=True,
        extra_args={"cfg_text_scale": 1.0, "cfg_img_scale": 1.0},
    )
    result = pipeline.forward(batch)
    assert result.error is None
    assert result.output["video"].shape[0] == 5


@pytest.mark.parametrize(
    ("change", "code", "name"),
    [
        ({"image": []}, "input_missing", "image"),
        ({"audio": None}, "input_missing", "audio"),
        ({"image": 1}, "input_count", "2"),
        ({"image": [b"corrupt", b"corrupt"]}, "input_unreadable", "image 1"),
        ({"audio": [np.zeros(16_000, np.float32)] * 2}, "input_too_short", "reference audio 1"),
        ({"height": 72}, "input_size", "height is 72"),
        ({"num_inference_steps": 0}, "input_value", "num_inference_steps is 0"),
        ({"extra_args": {"video_cfg_scale": float("nan")}}, "input_value", "video_cfg_scale is nan"),
        ({"prompt": "word " * 2000}, "input_too_long", "10000"),
        ({"prompt": "many words " * 300}, "input_too_long", "512"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_bad_request_is_a_clients_error_before_any_model_runs(
    pipeline: DreamIDOmniPipeline,
    recording: RunRecording,
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, Any],
    code: str,
    name: str,
) -> None:
    ran: list[PreparedRequest] = []
    monkeypatch.setattr(pipeline, "generate", ran.append)
    images, audios = recording.media("image"), recording.media("audio")
    change = dict(change)
    images = images[:1] if change.get("image") == 1 else change.pop("image", images)
    change.pop("image", None)
    audios = change.pop("audio", audios)
    prompt = change.pop("prompt", None)
    batch = request((images, audios), **change)
    if prompt is not None:
        batch.requests[0].prompt["prompt"] = prompt
    result = pipeline.forward(batch)
    assert not ran
    assert result.output is None
    assert f"[{code}]" in result.error and name in result.error
    assert (result.error_status_code, result.error_type) == (400, "BadRequestError")


def test_guidance_pushes_each_modality_by_its_own_references() -> None:
    full, no_text, no_images, no_audios = (
        (torch.tensor(v), torch.tensor(a)) for v, a in ((5, 7), (1, 2), (3, 4), (2, 6))
    )
    scales = dataclasses.asdict(GuidanceScales(3.0, 1.5, 4.0, 2.0))
    combine = DreamIDOmniPipeline.combine_multi_branch_cfg_noise
    video, audio = combine(None, [full, no_text, no_images, no_audios], scales)  # type: ignore[arg-type]
    assert video == 1 + 3.0 * (5 - 1) + 1.5 * (5 - 3)
    assert audio == 2 + 4.0 * (7 - 2) + 2.0 * (7 - 6)
