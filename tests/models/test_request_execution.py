"""Step execution, batches, several videos per request, and the prompt cache.

Both ports on tiny weights, with the engine's own scheduler and model runner in this process.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from vllm_omni.diffusion.cache.prompt_embed_cache import install_prompt_embed_cache, uninstall_prompt_embed_cache
from vllm_omni.diffusion.data import DiffusionOutput, OmniDiffusionConfig
from vllm_omni.diffusion.models.interface import supports_step_execution
from vllm_omni.diffusion.request import OmniDiffusionRequest
from vllm_omni.diffusion.sched.request_scheduler import RequestScheduler
from vllm_omni.diffusion.sched.step_scheduler import StepScheduler
from vllm_omni.diffusion.vllm_config import create_diffusion_vllm_config
from vllm_omni.diffusion.worker.diffusion_model_runner import DiffusionModelRunner
from vllm_omni.diffusion.worker.request_batch import DiffusionRequestBatch
from vllm_omni.inputs.data import OmniDiffusionSamplingParams

from port_kit.models.wan.pipeline.fusion_pipeline import FusionPipeline
from port_kit.pipeline.inputs import check_cached_outputs
from port_kit.pipeline.loading import load_pipeline
from port_kit.pipeline.media import measure_mp4, to_omni_payload, write_result
from port_kit.pipeline.process_funcs import get_pre_process_func
from port_kit.pipeline.request_state import DenoiseState
from port_kit.pipeline.step_execution import STATES
from port_kit.runtime.progress import Reporter, read
from port_kit.runtime.single_process import single_rank
from tests.helpers import raises

AUDIO = (0.1 * np.random.default_rng(0).standard_normal(40_000)).astype(np.float32)
IMAGE = Image.new("RGB", (64, 64), (90, 120, 60))
#: Of one request's latents, of up to 4, alone and in a batch: matrix products of other sizes round differently.
TOLERANCE = 1e-4

both_ports = pytest.mark.parametrize("pipeline", ["ovi", "dreamid_omni"], indirect=True)


@pytest.fixture(scope="module")
def pipeline(request: pytest.FixtureRequest, ovi_model: Path, dreamid_model: Path) -> Iterator[FusionPipeline]:
    """A tiny pipeline with the shortest state, 5 frames; Ovi unless a test requests both ports."""
    with single_rank(torch.float32), torch.inference_mode():
        made = load_pipeline(ovi_model if getattr(request, "param", "ovi") == "ovi" else dreamid_model)
        made.lengths = made.warm_up
        yield made


def media_of(pipeline: FusionPipeline, people: int = 1) -> dict[str, Any]:
    """Return the media of a request: for Ovi none, or a first frame; otherwise images with audios."""
    if type(pipeline).__name__ == "OviPipeline":
        return {"image": IMAGE} if people > 1 else {}
    return {"image": [IMAGE] * people, "audio": [AUDIO] * people}


def ask(
    pipeline: FusionPipeline,
    name: str,
    prompt: str = "rain on a roof",
    media: Mapping[str, Any] | None = None,
    **sampling: Any,
) -> OmniDiffusionRequest:
    """Make a small request of two steps."""
    fields = {"height": 64, "width": 64, "num_inference_steps": 2, "seed": 5, **sampling}
    given = {"prompt": prompt, "multi_modal_data": media_of(pipeline) if media is None else media}
    return OmniDiffusionRequest(given, OmniDiffusionSamplingParams(**fields), name)


@pytest.fixture
def undecoded(pipeline: FusionPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results hold latents in place of frames and samples: exact to compare, and most of the time is decoding."""

    def postprocess(states: Sequence[DenoiseState]) -> DiffusionOutput:
        assert all(state.is_done for state in states)
        video, audio = (torch.cat([state.latents[kind] for state in states]) for kind in ("video", "audio"))
        return DiffusionOutput(output={"video": video, "audio": audio})

    monkeypatch.setattr(pipeline, "postprocess", postprocess)


def serve(pipeline: FusionPipeline, *requests: OmniDiffusionRequest) -> Any:
    """Call the pipeline as the engine does without step execution."""
    return pipeline.forward(DiffusionRequestBatch([copy.deepcopy(request) for request in requests]))


def distance(found: DiffusionOutput, expected: DiffusionOutput) -> float:
    """Return the largest difference between two results."""
    assert found.error is None, found.error
    pairs = [(found.output[kind].float(), expected.output[kind].float()) for kind in ("video", "audio")]
    return max(float((one - other).abs().max()) for one, other in pairs)


def runner_of(pipeline: FusionPipeline) -> DiffusionModelRunner:
    """The engine's model runner around a pipeline that is loaded already."""
    config = OmniDiffusionConfig(model=pipeline.od_config.model, dtype=torch.float32, step_execution=True)
    device = torch.device("cpu")
    runner = DiffusionModelRunner(create_diffusion_vllm_config(device, config), config, device)
    runner.pipeline = pipeline
    return runner


class Engine:
    """The engine's step loop: its scheduler and its model runner, one step a call."""

    def __init__(self, pipeline: FusionPipeline, at_a_time: int = 4) -> None:
        self.runner = runner_of(pipeline)
        self.scheduler = StepScheduler()
        config = copy.copy(self.runner.od_config)
        config.max_num_seqs = at_a_time
        self.scheduler.initialize(config)
        self.results: dict[str, DiffusionOutput] = {}

    def add(self, request: OmniDiffusionRequest) -> None:
        """Take a request in."""
        self.scheduler.add_request(copy.deepcopy(request))

    def step(self) -> list[str]:
        """Make one step of all that run; return who they were."""
        scheduled = self.scheduler.schedule()
        output = self.runner.execute_stepwise(scheduled)
        for request_id in self.scheduler.update_from_output(scheduled, output):
            found = output.get_request_output(request_id)
            if found is not None and found.result is not None:
                self.results[request_id] = found.result
        return list(scheduled.scheduled_request_ids)

    def run(self) -> dict[str, DiffusionOutput]:
        """Step until no request is left."""
        while self.scheduler.num_running_requests() or self.scheduler.num_waiting_requests():
            self.step()
        return self.results


@both_ports
@pytest.mark.usefixtures("undecoded")
def test_interleaved_steps_equal_single_requests(pipeline: FusionPipeline) -> None:
    assert supports_step_execution(pipeline)
    first = ask(pipeline, "a", seed=1, num_inference_steps=3)
    second = ask(pipeline, "b", "a much longer prompt about a violin in the rain", seed=2)
    third = ask(pipeline, "c", media=media_of(pipeline, 2), seed=3, extra_args={"solver_name": "euler"})
    engine = Engine(pipeline)
    engine.add(first)
    assert engine.step() == ["a"]
    engine.add(second)
    engine.add(third)
    assert set(engine.step()) == {"a", "b", "c"}
    results = engine.run()
    for request in (first, second, third):
        assert distance(results[request.request_id], serve(pipeline, request)) < TOLERANCE
    assert not engine.runner.state_cache


def test_a_single_request_in_step_execution_equals_the_complete_run(pipeline: FusionPipeline) -> None:
    request = ask(pipeline, "a")
    engine = Engine(pipeline)
    engine.add(request)
    assert distance(engine.run()["a"], serve(pipeline, request)) == 0


@pytest.mark.usefixtures("undecoded")
def test_a_cancelled_request_leaves_between_steps_and_the_others_run_on(pipeline: FusionPipeline) -> None:
    from vllm_omni.diffusion.sched.interface import DiffusionRequestStatus

    engine = Engine(pipeline)
    kept, dropped = ask(pipeline, "kept"), ask(pipeline, "dropped", seed=9, num_inference_steps=500)
    engine.add(dropped)
    engine.add(kept)
    engine.step()
    assert engine.runner.state_cache["dropped"].extra[STATES][0].index == 1
    engine.scheduler.finish_requests("dropped", DiffusionRequestStatus.FINISHED_ABORTED)
    assert engine.step() == ["kept"]
    assert not engine.runner.state_cache, "what a cancelled request held is still there"
    assert distance(engine.results["kept"], serve(pipeline, kept)) < TOLERANCE


@pytest.mark.usefixtures("undecoded")
def test_a_refused_request_is_the_clients_error_and_the_others_run_on(pipeline: FusionPipeline) -> None:
    good, bad = ask(pipeline, "good"), ask(pipeline, "bad", extra_args={"solver_name": "magic"})
    engine = Engine(pipeline)
    engine.add(bad)
    engine.add(good)
    results = engine.run()
    assert results["bad"].error_status_code == 400 and "solver_name is 'magic'" in str(results["bad"].error)
    assert distance(results["good"], serve(pipeline, good)) == 0
    whole = serve(pipeline, bad, good)
    assert whole[0].error_status_code == 400
    assert distance(whole[1], results["good"]) == 0


@both_ports
@pytest.mark.usefixtures("undecoded")
def test_videos_of_one_request_are_those_of_requests_with_the_next_seeds(pipeline: FusionPipeline) -> None:
    asked = ask(pipeline, "n", seed=7, num_outputs_per_prompt=3)
    several = serve(pipeline, asked)
    for row in range(3):
        own = {kind: value[row : row + 1] for kind, value in several.output.items()}
        alone = serve(pipeline, ask(pipeline, "1", seed=7 + row))
        assert distance(DiffusionOutput(output=own), alone) < TOLERANCE
    assert (several.output["video"][0] - several.output["video"][1]).abs().max() > 0.1
    engine = Engine(pipeline)
    engine.add(asked)
    assert distance(engine.run()["n"], several) == 0


def test_several_videos_are_given_out_and_written_one_by_one(pipeline: FusionPipeline, tmp_path: Path) -> None:
    result = serve(pipeline, ask(pipeline, "n", num_inference_steps=1, num_outputs_per_prompt=2))
    made = to_omni_payload(result.output, fps=24, sample_rate=16_000)["payload"]
    assert [video.shape for video in made["video"]] == [(5, 64, 64, 3)] * 2
    assert made["video"][0].dtype == np.uint8 and made["audio"].shape == (2, *result.output["audio"].shape[1:])
    extra = {"audio": made["audio"], "audio_sample_rate": 16_000, "fps": 24}
    files = write_result(tmp_path / "rain.mp4", SimpleNamespace(images=made["video"], multimodal_output=extra))
    assert [file.name for file in files] == ["rain_1.mp4", "rain_2.mp4"]
    assert all(measure_mp4(file).frames == 5 for file in files)


@pytest.mark.parametrize(
    ("sampling", "code", "name"),
    [
        ({"num_outputs_per_prompt": 11}, "input_value", "num_outputs_per_prompt is 11"),
        ({"num_outputs_per_prompt": 2, "extra_args": {"video_noise": torch.zeros(1)}}, "input_value", "video_noise"),
        ({"seed": 2**63}, "input_value", f"seed is {2**63}"),
    ],
    ids=["too many", "one noise", "seed"],
)
def test_requests_that_allow_one_video_refuse_several(
    pipeline: FusionPipeline, sampling: dict[str, Any], code: str, name: str
) -> None:
    result = serve(pipeline, ask(pipeline, "bad", **sampling))
    assert result.error_status_code == 400
    assert f"[{code}]" in str(result.error) and name in str(result.error)


def test_a_cache_remembers_one_video() -> None:
    check_cached_outputs(1, "cache_dit")
    check_cached_outputs(2, None)
    with raises("input_value", "num_outputs_per_prompt", "2"):
        check_cached_outputs(2, "cache_dit")


@both_ports
@pytest.mark.usefixtures("undecoded")
def test_media_is_decoded_once_in_the_engine_process(
    pipeline: FusionPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_directory = FusionPipeline.read_directory

    def read_short(self: FusionPipeline, model: str) -> None:
        read_directory(self, model)
        self.lengths = self.warm_up

    monkeypatch.setattr(FusionPipeline, "read_directory", read_short)
    media = media_of(pipeline, people=2)
    expected = serve(pipeline, ask(pipeline, "alone", media=media))
    path = tmp_path / "image.png"
    IMAGE.save(path)
    media["image"] = [str(path)] * 2 if isinstance(media["image"], list) else str(path)
    config = copy.copy(pipeline.od_config)
    config.model_class_name = type(pipeline).__name__
    request = get_pre_process_func(config)(ask(pipeline, "prepared", media=media))
    assert "multi_modal_data" not in request.prompt
    path.unlink()
    received = pickle.loads(pickle.dumps(request))  # as the engine sends it to its workers
    assert distance(serve(pipeline, received), expected) == 0
    engine = Engine(pipeline)
    engine.add(received)
    assert distance(engine.run()["prepared"], expected) == 0


@pytest.mark.usefixtures("undecoded")
def test_a_batch_shares_calls_if_requests_fit_and_equals_single_requests(
    pipeline: FusionPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [
        ask(pipeline, "a", seed=1),
        ask(pipeline, "b", "wind in a tree", seed=2),
        ask(pipeline, "other text", "a much longer prompt about a violin in the rain", seed=3),
        ask(pipeline, "other size", height=32, width=128, seed=4),
        ask(pipeline, "more steps", num_inference_steps=3, seed=5),
        ask(pipeline, "other guidance", guidance_scale=2.5, seed=6),
    ]
    rows: list[int] = []
    transformer = pipeline.transformer.forward
    monkeypatch.setattr(
        pipeline.transformer, "forward", lambda **given: rows.append(given["video"].shape[0]) or transformer(**given)
    )
    together = serve(pipeline, *requests)
    joined = max(rows)
    tokens = [pipeline.prepare(one.prompt, one.sampling_params).tokens[0] for one in requests]
    assert joined == 2 + (len(tokens[0]) == len(tokens[1])) and set(rows) == {1, joined}
    for request, result in zip(requests, together, strict=True):
        assert distance(result, serve(pipeline, request)) < TOLERANCE, request.request_id
    rows.clear()
    monkeypatch.setattr(type(pipeline), "max_batch_size", 1)
    serve(pipeline, *requests[:2])
    assert set(rows) == {1}


@pytest.mark.usefixtures("undecoded")
def test_the_steps_of_each_request_are_reported(
    pipeline: FusionPipeline, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def steps() -> dict[str, tuple[int, int]]:
        return {name: (found.step, found.steps) for name, found in read(tmp_path).items()}

    seen: list[dict[str, tuple[int, int]]] = []
    monkeypatch.setattr(pipeline, "reporter", Reporter(tmp_path / "rank_0.json"))
    monkeypatch.setattr(pipeline, "on_step", lambda _: seen.append(steps()))
    short, long = ask(pipeline, "short"), ask(pipeline, "long", num_inference_steps=3, num_outputs_per_prompt=2)
    serve(pipeline, short, long)
    made = [(0, 0)] * 3 + [(1, 1)] * 3 + [(2, 2)] * 2  # a call per output and step, before the step is reported
    assert seen == [{"short": (one, 2), "long": (two, 3)} for one, two in made]
    assert steps() == {"short": (2, 2), "long": (3, 3)}

    monkeypatch.setattr(pipeline, "on_step", None)
    engine = Engine(pipeline)
    engine.add(ask(pipeline, "first", num_inference_steps=3))
    engine.step()
    engine.add(ask(pipeline, "second"))
    engine.step()
    assert steps() == {"short": (2, 2), "long": (3, 3), "first": (2, 3), "second": (1, 2)}
    engine.run()
    assert (steps()["first"], steps()["second"]) == ((3, 3), (2, 2))


def test_the_engine_batches_only_equal_sampling(pipeline: FusionPipeline) -> None:
    assert pipeline.supports_request_batch
    scheduler = RequestScheduler()
    scheduler.initialize(OmniDiffusionConfig(model="any", max_num_seqs=2))
    for name, sampling in {"a": {}, "b": {"seed": 8}, "c": {}, "d": {"height": 96}}.items():
        scheduler.add_request(ask(pipeline, name, **sampling))
    assert scheduler.schedule().scheduled_request_ids == ["a", "b"]


@pytest.mark.usefixtures("undecoded")
def test_the_prompt_cache_spares_the_text_encoder(pipeline: FusionPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[int] = []
    encoder = pipeline.text_encoder.forward
    monkeypatch.setattr(
        pipeline.text_encoder, "forward", lambda *given: runs.append(given[0].shape[1]) or encoder(*given)
    )
    plain = serve(pipeline, ask(pipeline, "plain"))
    assert len(runs) == 3
    cache = install_prompt_embed_cache(pipeline, max_size=8)
    assert cache is not None
    try:
        for expected in (6, 6):  # prompt and both negative prompts once, and then never again
            assert distance(serve(pipeline, ask(pipeline, "same")), plain) == 0
            assert len(runs) == expected
        other = ask(pipeline, "other", "snow on a roof")
        cached = serve(pipeline, other)
        assert len(runs) == 7, "only the other prompt is new"
        assert cache.stats() | {"max_size": 8} == {"size": 4, "max_size": 8, "hits": 5, "misses": 4, "bypassed": 0}
    finally:
        uninstall_prompt_embed_cache(pipeline)
    assert distance(cached, serve(pipeline, other)) == 0
