"""Planted faults that are easy to make and hard to see: each is found and reported by its kind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from torch import Tensor

from port_kit.parallel.layout import Layout
from port_kit.parallel.sequence import PaddedAttention, make_sp_plan
from port_kit.parallel.verify import ParallelTestCase, verify_layout
from port_kit.testing.workers import RankResult
from tests.parallel.transformer_pipeline import GOLDENS, INPUTS

REQUESTS = len(INPUTS) + len(GOLDENS)


def missing_plan() -> None:
    from port_kit.models.wan.transformer.model import WanFusionTransformer

    WanFusionTransformer._sp_plan = None


def misspelt_plan() -> None:
    from port_kit.models.wan.transformer.model import WanFusionTransformer

    plan = WanFusionTransformer._sp_plan
    WanFusionTransformer._sp_plan = {path.replace("shard", "shards"): sides for path, sides in plan.items()}


def half_a_plan() -> None:
    """Only the video stream is sharded; the audio stream is complete on every rank, but still exchanged."""
    from port_kit.models.wan.transformer.model import WanFusionTransformer

    WanFusionTransformer._sp_plan = make_sp_plan({"video.shard": (3, 4)}, {"video.gather": (3,)})


def unmasked_pad() -> None:
    whole = PaddedAttention.forward

    def forward(self: PaddedAttention, q: Tensor, k: Tensor, v: Tensor, kv_length: int | None = None) -> Tensor:
        return whole(self, q, k, v)

    PaddedAttention.forward = forward


def exchanged_text() -> None:
    from port_kit.models.wan.transformer import attention

    build = attention._attention
    attention._attention = lambda *args, skip_sequence_parallel=False, **options: build(*args, **options)


def local_norm() -> None:
    """Every rank takes its own heads for all of them."""
    from port_kit.models.wan.transformer import attention
    from port_kit.parallel.linear import tp_rank_and_size
    from port_kit.parallel.norm import square_sums

    ranks = tp_rank_and_size()[1]
    attention.tp_square_sums = lambda *tensors: [square_sums(x) * ranks for x in tensors]


def wrong_guidance_rank() -> None:
    from vllm_omni.diffusion.distributed import cfg_parallel

    right = cfg_parallel.get_classifier_free_guidance_rank
    cfg_parallel.get_classifier_free_guidance_rank = lambda: 1 - right()


def undivided_guidance() -> None:
    from vllm_omni.diffusion.distributed import cfg_parallel

    cfg_parallel._get_cfg_world_size_or_one = lambda: 1


def condition_without_match() -> None:
    from port_kit.models.wan.transformer.model import WanFusionTransformer

    WanFusionTransformer._hsdp_shard_conditions = [lambda name, _module: name.startswith("layers.")]


def condition_on_too_little() -> None:
    """HSDP also shards the root, so a condition that matches few modules must not hide complete blocks."""
    from port_kit.models.wan.transformer.model import WanFusionTransformer

    WanFusionTransformer._hsdp_ignored_modules = ["blocks"]


@pytest.mark.parametrize(
    ("plant", "layout", "fault", "where"),
    [
        (misspelt_plan, "ulysses2", "not_sharded", "blocks.0.video.self_attn.attn"),
        (half_a_plan, "ulysses2", "not_sharded", "blocks.0.audio.self_attn.attn"),
        (half_a_plan, "ring2", "not_cut", "audio.shard, tensor 1"),
        (unmasked_pad, "ulysses2", "padding_attended", "blocks.0.video.self_attn.attn"),
        (exchanged_text, "ulysses2", "replicated_keys_exchanged", "blocks.0.video.cross_attn.text_attn"),
        (local_norm, "tp2", "outputs_differ", "self_attn.norm_q"),
        (wrong_guidance_rank, "cfg2", "wrong_branch", "rank 0"),
        (undivided_guidance, "cfg2", "branches_not_divided", "rank 0"),
        (condition_on_too_little, "hsdp2", "weights_not_sharded", "rank 0"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                (missing_plan, "ulysses2", "not_sharded", "blocks.0.audio.self_attn.attn"),
                (unmasked_pad, "allgather2", "padding_attended", "blocks.0.video.self_attn.attn"),
                (unmasked_pad, "ring2", "padding_attended", "blocks.0.audio.self_attn.attn"),
                (condition_without_match, "hsdp2", "weights_not_sharded", "transformer"),
            )
        ),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_planted_fault_is_found_and_named(
    plant: Callable[[], None], layout: str, fault: str, where: str, subject: ParallelTestCase, single: RankResult
) -> None:
    prepare = subject.setup

    def setup(ranks: int) -> None:
        prepare(ranks)
        if ranks > 1:
            plant()

    faulty = replace(subject, requests=subject.requests[:1], setup=setup)
    alone = replace(single, outputs=single.outputs[:1], probe=_first_request(single.probe))
    report = verify_layout(faulty, Layout.parse(layout), alone)
    assert not report.ok
    found = {(finding.fault, finding.where.removeprefix("transformer.")) for finding in report.findings}
    assert any(f == fault and place.endswith(where) for f, place in found), found
    assert all(finding.hint for finding in report.findings)


def _first_request(probe: object) -> object:
    """Return the work of one rank for the first request."""
    attention = {path: calls[: len(calls) // REQUESTS] for path, calls in probe.attention.items()}
    return replace(probe, attention=attention, calls=probe.calls // REQUESTS)
