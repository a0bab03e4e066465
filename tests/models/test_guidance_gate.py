"""The guidance gate on tiny pipelines: by its definition, beside other requests, and with a cache."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from vllm_omni.diffusion.data import DiffusionParallelConfig, OmniDiffusionConfig
from vllm_omni.diffusion.request import OmniDiffusionRequest
from vllm_omni.diffusion.worker.request_batch import DiffusionRequestBatch
from vllm_omni.inputs.data import OmniDiffusionSamplingParams

from port_kit.errors import InputError
from port_kit.models.wan.pipeline.fusion_pipeline import FusionPipeline
from port_kit.pipeline.guidance_gate import GUIDANCE_GATE, GuidanceEffect, check_engine
from port_kit.pipeline.loading import load_pipeline
from port_kit.pipeline.request_state import DenoiseState, PreparedRequest
from port_kit.runtime.single_process import single_rank
from tests.helpers import raises

STEPS = 4
AUDIO = (0.1 * np.random.default_rng(0).standard_normal(40_000)).astype(np.float32)
IMAGE = Image.new("RGB", (64, 64), (90, 120, 60))


@pytest.fixture(scope="module", params=["ovi", "dreamid_omni"])
def pipeline(request: pytest.FixtureRequest, ovi_model: Path, dreamid_model: Path) -> Iterator[FusionPipeline]:
    """A tiny pipeline with the shortest state, 5 frames."""
    with single_rank(torch.float32), torch.inference_mode():
        made = load_pipeline(ovi_model if request.param == "ovi" else dreamid_model)
        made.lengths = made.warm_up
        yield made


def prepare(pipeline: FusionPipeline, prompt: str = "rain", seed: int = 5, **options: Any) -> PreparedRequest:
    """Prepare a small request."""
    is_ovi = type(pipeline).__name__ == "OviPipeline"
    media = {} if is_ovi else {"image": [IMAGE], "audio": [AUDIO]}
    sampling = OmniDiffusionSamplingParams(
        height=64, width=64, num_inference_steps=STEPS, seed=seed, extra_args=dict(options)
    )
    return pipeline.admit({"prompt": prompt, "multi_modal_data": media}, sampling)


def finish(pipeline: FusionPipeline, *states: DenoiseState) -> None:
    """Make all steps of states that run together."""
    while not states[0].is_done:
        for state, guided in zip(states, pipeline.predict(states), strict=True):
            pipeline.scheduler_step(state, guided)


def by_hand(pipeline: FusionPipeline, state: DenoiseState, gate: int) -> int:
    """Make all steps as the definition has them; return the number of calls of the transformer."""
    calls, kept = 0, None
    scales = vars(state.prepared.request.scales)
    for step in range(STEPS):
        branches = pipeline.branches(state)
        if step < gate:
            flows = [pipeline.transformer(**branch) for branch in branches]
            guided = pipeline.combine_multi_branch_cfg_noise(flows, dict(scales))
            kept = [one - first for one, first in zip(guided, flows[0], strict=True)]
            calls += len(branches)
        else:
            assert kept is not None
            guided = tuple(first + one for first, one in zip(pipeline.transformer(**branches[0]), kept, strict=True))
            calls += 1
        pipeline.scheduler_step(state, guided)
    return calls


def latents(state: DenoiseState) -> Tensor:
    return torch.cat([value.flatten() for value in state.latents.values()])


@pytest.mark.parametrize("gate", [1, 3])
def test_steps_after_the_gate_add_the_last_effect_of_guidance(pipeline: FusionPipeline, gate: int) -> None:
    prepared = prepare(pipeline, **{GUIDANCE_GATE: gate})
    (ours,), (expected,) = pipeline.begin(prepared), pipeline.begin(prepared)
    counted: list[None] = []
    handle = pipeline.transformer.register_forward_hook(lambda *_: counted.append(None))
    try:
        finish(pipeline, ours)
    finally:
        handle.remove()
    assert len(counted) == by_hand(pipeline, expected, gate)
    torch.testing.assert_close(latents(ours), latents(expected), rtol=1e-5, atol=1e-5)
    (plain,) = pipeline.begin(prepare(pipeline))
    finish(pipeline, plain)
    assert (latents(ours) - latents(plain)).abs().max() > 1e-3, "guidance changes from step to step"


def test_a_gate_at_the_end_changes_nothing(pipeline: FusionPipeline) -> None:
    (gated,), (plain,) = (pipeline.begin(prepare(pipeline, **extra)) for extra in ({GUIDANCE_GATE: STEPS}, {}))
    finish(pipeline, gated)
    finish(pipeline, plain)
    assert torch.equal(latents(gated), latents(plain))


def test_requests_with_other_gates_run_together(pipeline: FusionPipeline) -> None:
    gates: list[dict[str, Any]] = [{GUIDANCE_GATE: 1}, {GUIDANCE_GATE: 2}, {}]
    states = [pipeline.begin(prepare(pipeline, seed=seed, **gate))[0] for seed, gate in enumerate(gates)]
    finish(pipeline, *states)
    for seed, (gate, state) in enumerate(zip(gates, states, strict=True)):
        (alone,) = pipeline.begin(prepare(pipeline, seed=seed, **gate))
        finish(pipeline, alone)
        torch.testing.assert_close(latents(state), latents(alone), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("gate", [0, STEPS + 1, "2", 1.5])
def test_other_values_are_refused(pipeline: FusionPipeline, gate: Any) -> None:
    with pytest.raises(InputError, match=GUIDANCE_GATE):
        prepare(pipeline, **{GUIDANCE_GATE: gate})


def test_a_cache_over_guidance_ranks_excludes_the_gate(pipeline: FusionPipeline) -> None:
    config = OmniDiffusionConfig(
        model="any", cache_backend="cache_dit", parallel_config=DiffusionParallelConfig(cfg_parallel_size=2)
    )
    check_engine(prepare(pipeline).request, config)
    gated = prepare(pipeline, **{GUIDANCE_GATE: 2}).request
    check_engine(gated, OmniDiffusionConfig(model="any", cache_backend="cache_dit"))
    with raises("input_value", "cfg_parallel_size=2"):
        check_engine(gated, config)


def test_a_request_that_the_engine_cannot_run_is_the_clients_error(
    pipeline: FusionPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = OmniDiffusionConfig(
        model="any", cache_backend="cache_dit", parallel_config=DiffusionParallelConfig(cfg_parallel_size=2)
    )
    monkeypatch.setattr(pipeline, "od_config", config)
    request = OmniDiffusionRequest("rain", OmniDiffusionSamplingParams(), "gated")
    request.prepared_layout = prepare(pipeline, **{GUIDANCE_GATE: 2})
    result: Any = pipeline.forward(DiffusionRequestBatch([request]))
    assert result.error_status_code == 400 and "cfg_parallel_size" in str(result.error)


def test_the_effect_is_kept_in_float32_and_has_the_dtype_of_guidance() -> None:
    guided, first = torch.tensor([1000.0]), torch.tensor([1.0078125], dtype=torch.bfloat16)
    effect = GuidanceEffect.between([guided], [first])
    (found,) = effect.add_to([torch.tensor([2.0], dtype=torch.bfloat16)])
    assert found.dtype == torch.float32 and found.item() == 1000.0 - 1.0078125 + 2.0
