"""Cache-DiT with the four guidance branches of DreamID-Omni: exact without reuse, equal on any number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from port_kit.parallel.layout import Layout
from port_kit.testing.workers import Request, run_workers
from tests.helpers import slow

#: Enough for the default four steps of warm-up and some reuse after them.
STEPS = 10
#: Reuses a part: the residuals of random weights change more from step to step than those of a trained model.
LOOSE = {"residual_diff_threshold": 0.9}
#: Reuses nothing, and still goes all the way through the cache.
EXACT = {"residual_diff_threshold": 0.0}
#: Largest difference of latents on other ranks: rounding, over ten guided steps.
SAME = 2e-4


def sing(gate: int = STEPS) -> Request:
    """A small request with one reference image and one reference audio."""
    samples = (0.1 * np.random.default_rng(1).standard_normal(33_000)).astype(np.float32)
    media = {"image": [Image.new("RGB", (60, 40), (200, 30, 90))], "audio": [samples]}
    prompt = {"prompt": "one person sings", "multi_modal_data": media}
    return Request(
        prompt,
        {
            "height": 64,
            "width": 64,
            "num_inference_steps": STEPS,
            "seed": 11,
            "extra_args": {"guidance_gate_step": gate},
        },
    )


def watch() -> None:
    """Make pipelines of this process keep the latents of their last step and count computed blocks."""
    from port_kit.models.wan.pipeline.fusion_pipeline import FusionPipeline
    from port_kit.models.wan.transformer.block import FusionBlock

    FusionPipeline.last = None
    FusionPipeline.computed = 0
    make, forward = FusionPipeline.__init__, FusionBlock.forward

    def keep(self: Any, **options: Any) -> None:
        make(self, **options)
        self.on_step = lambda step: setattr(FusionPipeline, "last", (step.latents["video"], step.latents["audio"]))

    def count(self: Any, *args: Any, **options: Any) -> Any:
        FusionPipeline.computed += 1
        return forward(self, *args, **options)

    FusionPipeline.__init__, FusionBlock.forward = keep, count


def run(
    model: Path, layout: str = "single", cache: dict[str, Any] | None = None, gate: int = STEPS
) -> tuple[list[Tensor], int]:
    """Return the latents of a request and how many blocks rank 0 computed; with a cache, of the second of two."""
    config: dict[str, Any] = {"parallel_config": Layout.parse(layout).parallel_config}
    if cache is not None:
        config |= {"cache_backend": "cache_dit", "cache_config": cache}

    def probe(pipeline: nn.Module) -> tuple[list[Tensor], int]:
        return [value.cpu() for value in type(pipeline).last], type(pipeline).computed

    requests = [sing(gate)] * (1 if cache is None else 2)
    results = run_workers(model, requests, config=config, setup=watch, probe=probe)
    for result in results[1:]:
        assert distance(result.probe[0], results[0].probe[0]) < SAME
    return results[0].probe


def distance(some: list[Tensor], others: list[Tensor]) -> float:
    """Largest difference of two pairs of latents."""
    return max((a - b).abs().max().item() for a, b in zip(some, others, strict=True))


@pytest.fixture(scope="module")
def plain(dreamid_model: Path) -> tuple[list[Tensor], int]:
    """Without a cache, on one rank."""
    return run(dreamid_model)


@pytest.fixture(scope="module")
def cached(dreamid_model: Path) -> tuple[list[Tensor], int]:
    """With a cache that reuses, on one rank that runs all four branches."""
    return run(dreamid_model, cache=LOOSE)


def test_a_cache_without_reuse_has_no_effect(dreamid_model: Path, plain: tuple[list[Tensor], int]) -> None:
    latents, computed = run(dreamid_model, cache=EXACT)
    assert computed == 2 * plain[1]
    assert all(torch.equal(a, b) for a, b in zip(latents, plain[0], strict=True))


def test_a_cache_skips_blocks_and_stays_near(plain: tuple[list[Tensor], int], cached: tuple[list[Tensor], int]) -> None:
    assert cached[1] < 0.9 * 2 * plain[1]
    assert 0 < distance(cached[0], plain[0]) < 0.2 * max(value.abs().max() for value in plain[0])


@pytest.mark.parametrize("layout", ["hsdp2xcfg2", *slow("tp2", "cfg2", "ulysses2", "ring2")])
def test_ranks_reuse_the_same_blocks(layout: str, dreamid_model: Path, cached: tuple[list[Tensor], int]) -> None:
    latents, computed = run(dreamid_model, layout, LOOSE)
    cfg_ranks = Layout.parse(layout).cfg
    assert computed * cfg_ranks == pytest.approx(cached[1], rel=0.02)
    assert distance(latents, cached[0]) < SAME


def watch_contexts() -> None:
    """Make pipelines of this process note the branch whose context each call of the transformer gets."""
    from port_kit.models.wan.pipeline.fusion_pipeline import FusionPipeline
    from port_kit.pipeline.caching import BranchCacheContexts

    watch()
    FusionPipeline.branches_of_contexts = []
    install = BranchCacheContexts.__call__

    def note(hook: BranchCacheContexts, transformer: nn.Module, args: tuple[Any, ...]) -> None:
        install(hook, transformer, args)
        ((name, kept),) = hook.kept.items()
        FusionPipeline.branches_of_contexts.append([hook.installed[name] is one for one in kept].index(True))

    BranchCacheContexts.__call__ = note


@pytest.mark.slow
def test_after_a_guidance_gate_the_first_branch_goes_on_with_its_own_cache(dreamid_model: Path) -> None:
    gate = STEPS - 3
    config = {"parallel_config": {}, "cache_backend": "cache_dit", "cache_config": EXACT}

    def probe(pipeline: nn.Module) -> tuple[list[Tensor], list[int]]:
        return [value.cpu() for value in type(pipeline).last], type(pipeline).branches_of_contexts

    requests = [sing(gate), sing(gate)]
    (rank,) = run_workers(dreamid_model, requests, config=config, setup=watch_contexts, probe=probe)
    latents, branches = rank.probe
    assert branches[-(4 * gate + 3) :] == [0, 1, 2, 3] * gate + [0, 0, 0]
    gated, _ = run(dreamid_model, gate=gate)
    assert all(torch.equal(a, b) for a, b in zip(latents, gated, strict=True))
