"""Kinds of original code: inference, and equality of ranks with one rank."""

from __future__ import annotations

import threading
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import nn

from port_kit.autoparallel.attention_functions import AttentionCall, recognize
from port_kit.autoparallel.attention_packages import STAND_INS, attention_packages
from port_kit.autoparallel.boundaries import shard_tokens
from port_kit.autoparallel.cpu import EagerStance
from port_kit.autoparallel.exchange import ThreadExchange, ThreadWorld
from port_kit.autoparallel.infer import infer_plan
from port_kit.autoparallel.original_code import bare_packages
from port_kit.autoparallel.plan import Plan
from port_kit.autoparallel.prove import Prover
from port_kit.autoparallel.simulate import run_once, run_trial
from port_kit.autoparallel.subject import OTHER_SCALES, ModelScale, Subject, TokenScale, load_subject
from port_kit.errors import ParallelError
from port_kit.parallel.layout import Layout
from tests.autoparallel import kinds_subject

INPUTS = TokenScale(image=2, text=2, audio=2, batch=1, masked=True)


@cache
def _infer(kind: str) -> tuple[Subject, Plan]:
    subject = kinds_subject.subject(kind)
    plan = infer_plan(subject)
    assert not plan.refused
    return subject, Plan.from_toml(plan.to_toml())


@pytest.mark.parametrize("kind", kinds_subject.KINDS)
def test_plans_hold_for_other_configurations(kind: str) -> None:
    subject, plan = _infer(kind)
    model, inputs = subject.build(OTHER_SCALES["wider"]), subject.inputs(INPUTS)
    single = run_once(model, inputs)
    trial = run_trial(model, inputs, plan, {}, single, 2)
    assert trial.ok, trial
    alone = plan.model_copy(update={"attention": ()})  # without exchange
    assert not run_trial(model, inputs, alone, {}, single, 2).ok


@pytest.mark.parametrize("kind", ["Flash2", "Flash3", "Packed", "Stored", "Xformers", "Sage", "Helper"])
def test_calls_of_attention_functions_are_exchanged(kind: str) -> None:
    _, plan = _infer(kind)
    (site,) = plan.attention
    assert site.at == "kernel" and site.keys == ("audio",)
    assert {"Packed": "varlen", "Xformers": "memory", "Sage": "sage"}.get(kind, "flash") in site.call[-1]


def test_arguments_are_gathered_for_code_that_reads_their_length() -> None:
    _, plan = _infer("SoftmaxBlock")
    (site,) = plan.attention
    assert site.at == "linears" and [axis.path for axis in site.gathered] == ["x"]


def test_three_streams_convolutions_and_layers_of_einops() -> None:
    _, plan = _infer("Streams")
    assert {site.keys for site in plan.attention} == {("audio", "image", "text")}
    halos = {whole.module: whole.halo for whole in plan.whole}
    assert halos == {"blocks.*.out": 1, "blocks.*.up": 1, "blocks.*.down": 2}
    (heads,) = (value for value in plan.divided if value.module == "blocks.*.split")
    assert heads.index == (0, 1)
    roles = {linear.module: linear.role for linear in plan.linears}
    assert roles["blocks.*.up"] == "column" and roles["blocks.*.out"] == roles["blocks.*.down"] == "row"


@pytest.mark.integration
@pytest.mark.parametrize("kind", ["Streams", "Helper", "SoftmaxBlock"])
def test_kinds_are_proven(kind: str) -> None:
    subject, plan = _infer(kind)
    prover = Prover(subject, plan, {"wider": OTHER_SCALES["wider"]})
    for layout in ("ring2", "tp2xulysses2"):
        result = prover.prove(Layout.parse(layout))
        assert result.proven, result.reason


def test_code_that_takes_another_path_is_an_error() -> None:
    subject, plan = _infer("Flash2")
    model = subject.build(OTHER_SCALES["deeper"])
    shard_tokens(model, plan, ThreadExchange(ThreadWorld(2), 0))
    for block in model.get_submodule("blocks").children():
        block.attend = lambda q, _k, _v: q  # type: ignore[assignment]
    with pytest.raises(ParallelError) as caught:
        model(**subject.inputs(INPUTS))
    assert caught.value.code == "plan_tokens"


def test_functions_are_recognized_by_their_parameters() -> None:
    def flash_attention(q: object, k: object, v: object, num_heads: int) -> None:
        """Take other arguments than the known helper."""

    assert recognize(flash_attention) is None
    known = recognize(kinds_subject.flash_attention)
    assert known is not None and known.lengths == "k_lens"
    two, three = recognize(kinds_subject.flash_2), recognize(kinds_subject.flash_attn_interface.flash_attn_func)
    assert two is not None and three is not None and three.own_result and not two.own_result


def test_modules_without_numbers_are_an_error() -> None:
    subject = kinds_subject.subject("Flash2")

    def build(scale: ModelScale) -> nn.Module:
        model = subject.build(scale)
        model.get_parameter("enter.weight").data.fill_(float("nan"))
        return model

    with pytest.raises(ParallelError) as caught:
        infer_plan(replace(subject, build=build))
    assert caught.value.code == "plan_subject"


def test_windows_need_the_function_itself() -> None:
    signature, x = recognize(kinds_subject.flash_2), torch.zeros(1, 4, 2, 8)
    assert signature is not None
    assert AttentionCall(signature, kinds_subject.flash_2, (x, x, x), {}).is_regular
    assert not AttentionCall(signature, kinds_subject.flash_2, (x, x, x), {"window_size": (2, 2)}).is_regular
    with pytest.raises(ParallelError) as caught:
        AttentionCall(signature, kinds_subject.flash_2, (x,) * 9, {})
    assert caught.value.code == "plan_inference"


def test_packages_without_stand_in_and_missing_ones_are_errors() -> None:
    with pytest.raises(ParallelError) as caught, attention_packages("no_such_package"):
        pass
    assert caught.value.code == "plan_subject" and STAND_INS[0] in str(caught.value)
    with pytest.raises(ParallelError) as caught:
        bare_packages("no_such_package")
    assert caught.value.code == "plan_subject"
    with pytest.raises(ParallelError) as caught:
        load_subject("no_such_package.module:function")
    assert "no_such_package" in str(caught.value)


def test_the_stance_of_compilation_is_restored_after_overlapping_threads() -> None:
    stance = EagerStance()
    before = torch._dynamo.eval_frame._stance.stance
    stance.enter()
    other = threading.Thread(target=stance.enter)
    other.start()
    other.join()
    stance.leave()
    assert torch._dynamo.eval_frame._stance.stance == "force_eager"
    stance.leave()
    assert torch._dynamo.eval_frame._stance.stance == before
