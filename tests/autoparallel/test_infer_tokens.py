"""Inference of token streams, and its application on ranks that are threads."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from port_kit.autoparallel.infer_tokens import infer_tokens
from port_kit.autoparallel.plan import Plan
from port_kit.autoparallel.simulate import run_once, run_trial
from port_kit.autoparallel.subject import OTHER_SCALES, ModelScale, Subject, TokenScale, load_subject
from port_kit.errors import ParallelError

#: Inputs that no plan was inferred from.
INPUTS = TokenScale(image=2, text=2, audio=2, batch=1, masked=True)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Give each rank, which is a thread, one thread of torch."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@cache
def _infer(name: str) -> tuple[Subject, Plan]:
    subject = load_subject(name)
    plan = infer_tokens(subject).plan
    assert plan is not None
    return subject, Plan.from_toml(plan.to_toml())


@pytest.mark.parametrize("name", ["FluxTransformer2DModel", "WanTransformer3DModel"])
def test_plans_hold_for_other_configurations(name: str) -> None:
    subject, plan = _infer(name)
    assert not plan.whole
    for scale, ranks in ((OTHER_SCALES["deeper"], 2), (OTHER_SCALES["wider"], 4)):
        model, inputs = subject.build(scale), subject.inputs(INPUTS, scale)
        trial = run_trial(model, inputs, plan, {}, run_once(model, inputs), ranks)
        assert trial.ok, trial
        assert trial.exchanges["heads"]


def test_text_keys_are_not_communicated() -> None:
    _, plan = _infer("WanTransformer3DModel")
    assert [stream.name for stream in plan.streams] == ["image"]
    assert {site.module: site.keys for site in plan.attention} == {
        "blocks.*.attn1": ("image",),
        "blocks.*.attn2": ("*",),
    }


def test_tokens_stay_sharded_between_lists_of_blocks() -> None:
    _, plan = _infer("FluxTransformer2DModel")
    assert {blocks.modules: blocks.gather for blocks in plan.blocks} == {
        "transformer_blocks.*": "never",
        "single_transformer_blocks.*": "last",
    }


def test_indexed_tables_stay_complete() -> None:
    _, plan = _infer("AllegroTransformer3DModel")
    sharded = {axis.path for blocks in plan.blocks for axis in blocks.inputs}
    assert "image_rotary_emb.1.0" in sharded and "image_rotary_emb.0.0.0" not in sharded
    assert not plan.whole


def test_convolutions_exchange_rows() -> None:
    _, plan = _infer("SanaTransformer2DModel")
    halos = {whole.module: whole.halo for whole in plan.whole}
    assert halos["transformer_blocks.*.ff.conv_depth"] == 1


def test_code_between_blocks_that_mixes_tokens_makes_every_block_gather() -> None:
    subject, plan = _infer("tests.autoparallel.custom_subject:subject")
    (blocks,), (site,) = plan.blocks, plan.attention
    assert blocks.gather == "each"
    assert site.call == ("forward", "attend", "scaled_dot_product_attention")
    model, inputs = subject.build(OTHER_SCALES["wider"]), subject.inputs(INPUTS)
    assert run_trial(model, inputs, plan, {}, run_once(model, inputs), 4).ok


def test_a_plan_of_other_streams_differs_or_fails() -> None:
    subject, plan = _infer("WanTransformer3DModel")
    model, inputs = subject.build(OTHER_SCALES["deeper"]), subject.inputs(INPUTS)
    local = plan.model_copy(update={"attention": ()})  # attention without exchange
    assert not run_trial(model, inputs, local, {}, run_once(model, inputs)).ok


def test_modules_without_tokens_are_refused() -> None:
    found = infer_tokens(load_subject("PriorTransformer"))
    assert found.plan is None and found.reason


def test_runs_with_other_calls_are_an_error() -> None:
    subject = load_subject("tests.autoparallel.custom_subject:subject")

    def build(scale: ModelScale) -> nn.Module:
        model = subject.build(scale)
        block = model.get_submodule("blocks.0")

        def call_more(_module: nn.Module, args: tuple[Tensor]) -> None:
            if args[0].shape[1] > 17:  # image and text tokens of the smallest input
                block.get_submodule("out")(args[0])

        block.get_submodule("qkv").register_forward_pre_hook(call_more)
        return model

    with pytest.raises(ParallelError) as caught:
        infer_tokens(dataclasses.replace(subject, build=build))
    assert caught.value.code == "plan_inference"
