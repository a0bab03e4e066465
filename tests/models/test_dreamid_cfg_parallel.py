"""The four branches of a step on 1, 2 and 4 ranks: the same video and audio, and each rank runs only its share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from port_kit.errors import ParallelError
from port_kit.runtime.progress import FOLDER, read
from port_kit.testing.workers import RankResult, Request, run_workers
from tests.helpers import slow

STEPS = 2


def talk(**options: int) -> Request:
    """A small request with one image and one audio."""
    audio = (0.1 * np.random.default_rng(1).standard_normal(33_000)).astype(np.float32)
    media = {"image": [Image.new("RGB", (60, 40), (200, 30, 90))], "audio": [audio]}
    prompt = {"prompt": "one person sings", "multi_modal_data": media}
    return Request(prompt, {"height": 64, "width": 64, "num_inference_steps": STEPS, "seed": 11, "extra_args": options})


GATED = {"guidance_gate_step": 1}


def run(model: Path, ranks: int) -> list[RankResult]:
    """Serve the request without and with a guidance gate; the probe returns the transformer calls of both per rank."""
    config = {"parallel_config": {"cfg_parallel_size": ranks}}

    def probe(pipeline: nn.Module) -> tuple[int, int]:
        return calls(pipeline, talk()), calls(pipeline, talk(**GATED))

    return run_workers(model, [talk(), talk(**GATED)], config=config, probe=probe)


def calls(pipeline: nn.Module, request: Request) -> int:
    """Serve a request and count its transformer calls."""
    from vllm_omni.diffusion.request import OmniDiffusionRequest
    from vllm_omni.diffusion.worker.request_batch import DiffusionRequestBatch
    from vllm_omni.inputs.data import OmniDiffusionSamplingParams

    counted: list[Any] = []
    handle = pipeline.transformer.register_forward_hook(lambda *arguments: counted.append(None))
    sampling = OmniDiffusionSamplingParams(**request.sampling)
    with torch.inference_mode():
        pipeline.forward(DiffusionRequestBatch([OmniDiffusionRequest(request.prompt, sampling, "second")]))
    handle.remove()
    return len(counted)


@pytest.fixture(scope="module")
def alone(dreamid_model: Path) -> RankResult:
    """The result of one rank."""
    return run(dreamid_model, 1)[0]


@pytest.mark.parametrize("ranks", [2, *slow(4)])
def test_branches_are_divided_and_the_result_is_the_same(
    dreamid_model: Path, alone: RankResult, ranks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FOLDER, str(tmp_path))
    assert alone.probe == (4 * STEPS, 4 + 1)
    for result in run(dreamid_model, ranks):
        assert result.probe == (4 * STEPS // ranks, 4 // ranks + 1)
        for output, expected in zip(result.outputs, alone.outputs, strict=True):
            difference = output["video"].int() - expected["video"].int()
            assert difference.abs().max() <= 1  # of 255: a rounding of the last place may fall the other way
            assert (output["audio"] - expected["audio"]).abs().max() < 1e-5
    assert [path.name for path in tmp_path.iterdir()] == ["rank_0.json"], "one rank reports the steps"
    assert (read(tmp_path)["second"].step, read(tmp_path)["second"].steps) == (STEPS, STEPS)


def test_a_cache_over_ranks_with_unequal_numbers_of_branches_is_refused(dreamid_model: Path) -> None:
    config = {"parallel_config": {"cfg_parallel_size": 3}, "cache_backend": "cache_dit"}
    with pytest.raises(ParallelError) as caught:
        run_workers(dreamid_model, [talk()], config=config)
    cause = caught.value.__cause__
    assert isinstance(cause, ParallelError) and cause.code == "cache_passes"


def test_a_cache_of_two_branches_per_rank_without_reuse_has_no_effect(dreamid_model: Path, alone: RankResult) -> None:
    """With a threshold of zero every residual is computed: swapped branches would change the result."""
    config = {
        "parallel_config": {"cfg_parallel_size": 2},
        "cache_backend": "cache_dit",
        "cache_config": {"residual_diff_threshold": 0.0, "max_warmup_steps": 0},
    }
    for result in run_workers(dreamid_model, [talk()], config=config):
        assert (result.outputs[0]["audio"] - alone.outputs[0]["audio"]).abs().max() < 1e-5
