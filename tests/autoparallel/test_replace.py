"""Hand-written modules in place of adapted ones: their parameters, hooks, and exchanges of tokens."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from port_kit.autoparallel.plan import Plan
from port_kit.autoparallel.replace import replace_modules
from port_kit.autoparallel.shipped import SHIPPED
from port_kit.autoparallel.subject import ModelScale, TokenScale, load_subject
from tests.helpers import raises

NAME = "WanTransformer3DModel"
SUBJECT = load_subject(NAME)
HERE = "tests.autoparallel.replacements"


@pytest.fixture
def model() -> nn.Module:
    return SUBJECT.build(ModelScale())


@pytest.fixture(scope="module")
def plan() -> Plan:
    return Plan.load(SHIPPED / f"{NAME}.toml")


@torch.no_grad()
def run(model: nn.Module) -> torch.Tensor:
    """Return the output for the smallest input."""
    return SUBJECT.output(model(**SUBJECT.inputs(TokenScale())))[0]


def test_modules_are_replaced_at_their_places(model: nn.Module, plan: Plan) -> None:
    expected, names = run(model), list(model.state_dict())
    seen: list[str] = []
    model.get_submodule("blocks.0.ffn").register_forward_pre_hook(lambda *_: seen.append("hook"))
    assert replace_modules(model, {"blocks.*.ffn": f"{HERE}:SameFeedForward"}, plan) == plan
    assert type(model.get_submodule("blocks.1.ffn")).__name__ == "SameFeedForward"
    assert not model.get_submodule("blocks.1.ffn").training
    assert list(model.state_dict()) == names
    assert torch.equal(run(model), expected) and seen == ["hook"]


def test_the_replacement_computes(model: nn.Module) -> None:
    expected = run(model)
    assert replace_modules(model, {"blocks.0.ffn": f"{HERE}:DoubledFeedForward"}, None) is None
    assert (run(model) - expected).abs().max() > 1e-3


def test_other_parameters_are_refused(model: nn.Module) -> None:
    with raises("plan_replace", "blocks.0.ffn", "FeedForward") as caught:
        replace_modules(model, {"blocks.0.ffn": f"{HERE}:ShrunkFeedForward"}, None)
    problems = caught.value.details["problems"]
    assert isinstance(problems, list)
    assert "net.0.proj.weight is missing" in problems and "gate.weight is unexpected" in problems
    assert any(text.startswith("net.2.weight: expected parameter") for text in problems)


def test_another_dtype_is_refused(model: nn.Module) -> None:
    with raises("plan_replace", "bfloat16"):
        replace_modules(model, {"blocks.0.ffn": f"{HERE}:RoundedFeedForward"}, None)


def test_a_pattern_without_modules_is_refused(model: nn.Module) -> None:
    with raises("plan_pattern", "blocks.*.nothing"):
        replace_modules(model, {"blocks.*.nothing": f"{HERE}:SameFeedForward"}, None)


def test_attention_states_who_exchanges_tokens(model: nn.Module, plan: Plan) -> None:
    own = {site.module for site in plan.attention}
    assert "blocks.*.attn1" in own
    with raises("plan_replace", "blocks.*.attn1", "exchanges_tokens"):
        replace_modules(model, {"blocks.*.attn1": f"{HERE}:KeptAttention"}, plan)
    with raises("plan_replace", "not all of them"):
        replace_modules(model, {"blocks.0.attn1": f"{HERE}:ExchangingAttention"}, plan)
    kept = replace_modules(model, {"blocks.*.attn1": f"{HERE}:PlannedAttention"}, plan)
    assert kept == plan
    dropped = replace_modules(model, {"blocks.*.attn1": f"{HERE}:ExchangingAttention"}, plan)
    assert dropped is not None and {site.module for site in dropped.attention} == own - {"blocks.*.attn1"}
