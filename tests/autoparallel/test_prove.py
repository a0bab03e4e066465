"""Tests of proofs: what they prove, and faulty plans that they must reject."""

from __future__ import annotations

import pytest

from port_kit.autoparallel.plan import Plan, Refusal
from port_kit.autoparallel.prove import CONTROL_FACTOR, TOLERANCE, LayoutResult, Prover, difference, with_proofs
from port_kit.autoparallel.shipped import SHIPPED
from port_kit.autoparallel.subject import ModelScale, Subject, load_subject
from port_kit.parallel.layout import Layout

NAME = "WanTransformer3DModel"


@pytest.fixture(scope="module")
def subject() -> Subject:
    return load_subject(NAME)


@pytest.fixture(scope="module")
def plan() -> Plan:
    return Plan.load(SHIPPED / f"{NAME}.toml").model_copy(update={"proofs": ()})


@pytest.fixture(scope="module")
def prover(subject: Subject, plan: Plan) -> Prover:
    return Prover(subject, plan, {"wider": ModelScale(2, 2, 2)})


def prove(prover: Prover, layout: str) -> LayoutResult:
    return prover.prove(Layout.parse(layout))


@pytest.mark.integration
def test_sequence_parallel_layouts(prover: Prover) -> None:
    for layout in ("ulysses2", "ring2", "ulysses4"):
        result = prove(prover, layout)
        assert result.proven, result.reason
        assert set(result.scales) == {"inferred", "wider"}
        assert result.difference is not None and result.difference <= TOLERANCE
        assert result.control is not None and result.control >= CONTROL_FACTOR * TOLERANCE
        assert result.tokens == pytest.approx(1 / Layout.parse(layout).sequence, rel=0.2)
        assert sum(result.exchanges.values()) > 0


@pytest.mark.integration
def test_channels_and_tokens_are_split_together(prover: Prover) -> None:
    result = prove(prover, "tp2xulysses2")
    assert result.proven, result.reason
    assert result.block_bytes == pytest.approx(0.5, rel=0.1)
    assert result.tokens == pytest.approx(0.5, rel=0.1)
    assert result.control is not None and result.control >= CONTROL_FACTOR * TOLERANCE


@pytest.mark.integration
def test_blocks_are_sharded_and_branches_kept_apart(prover: Prover) -> None:
    result = prove(prover, "hsdp2xcfg2")
    assert result.proven, result.reason
    assert result.block_bytes == pytest.approx(0.5, rel=0.05)
    assert result.control is not None and result.control >= CONTROL_FACTOR * TOLERANCE


@pytest.mark.integration
def test_tokens_that_are_not_exchanged_are_found(subject: Subject, plan: Plan) -> None:
    faulty = plan.model_copy(update={"attention": ()})
    result = prove(Prover(subject, faulty, {}), "ulysses2")
    assert not result.proven
    assert result.difference is not None and result.difference > TOLERANCE


@pytest.mark.integration
def test_work_that_is_not_divided_is_found(subject: Subject, plan: Plan) -> None:
    blocks = tuple(each.model_copy(update={"inputs": (), "outputs": ()}) for each in plan.blocks)
    faulty = plan.model_copy(update={"blocks": blocks})
    result = prove(Prover(subject, faulty, {}), "ulysses2")
    assert not result.proven
    assert result.difference is not None and result.difference <= TOLERANCE


@pytest.mark.integration
def test_channels_of_other_heads_are_found(subject: Subject, plan: Plan) -> None:
    kept = tuple(linear for linear in plan.linears if not linear.module.endswith("attn1.to_v"))
    result = prove(Prover(subject, plan.model_copy(update={"linears": kept}), {}), "tp2")
    assert not result.proven


@pytest.mark.integration
def test_an_error_of_a_rank_is_a_reason(subject: Subject, plan: Plan) -> None:
    stale = plan.model_copy(update={"blocks": (plan.blocks[0].model_copy(update={"modules": "blocks.*.attn1"}),)})
    result = prove(Prover(subject, stale, {}), "ulysses2")
    assert not result.proven and result.difference is None and result.reason


def test_refusals_run_nothing(subject: Subject, plan: Plan) -> None:
    refusal = Refusal(kind="sequence", reason="tokens are mixed")
    refused = plan.model_copy(update={"refused": (refusal,), "blocks": (), "attention": ()})
    result = prove(Prover(subject, refused, {}), "ring2")
    assert not result.proven and "tokens are mixed" in result.reason


def test_difference_is_relative_and_infinite_for_other_shapes() -> None:
    import torch

    one = (torch.tensor([4.0, -8.0]),)
    assert difference(one, one) == 0
    assert difference((torch.tensor([4.0, -7.0]),), one) == 0.125
    assert difference((torch.tensor([4.0]),), one) == float("inf")
    assert difference((torch.tensor([4.0, float("nan")]),), one) == float("inf")
    assert difference((), one) == float("inf")


def test_proofs_replace_those_of_the_same_layout(plan: Plan) -> None:
    proven = LayoutResult("ulysses2", proven=True, difference=1e-7, tokens=0.5, scales={"inferred": 1e-7, "wider": 0.0})
    failed = LayoutResult("ring2", proven=False, difference=1.0, scales={"inferred": 1.0})
    recorded = with_proofs(with_proofs(plan, [proven]), [proven, failed])
    assert [(proof.layout, proof.scale) for proof in recorded.proofs] == [
        ("ulysses2", "inferred"),
        ("ulysses2", "wider"),
    ]
    assert Plan.from_toml(recorded.to_toml()) == recorded
