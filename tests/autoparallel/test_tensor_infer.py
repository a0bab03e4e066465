"""Tensor parallelism inferred from gradients, and proven on forked ranks."""

from __future__ import annotations

from functools import cache

import pytest

from port_kit.autoparallel.plan import ChannelRule, Plan
from port_kit.autoparallel.subject import ModelScale, Subject, load_subject
from port_kit.autoparallel.tensor.infer import TensorSections, infer_tensor_parallelism

REFERENCE = "tests.autoparallel.tensor_subject:subject"


@cache
def _sections() -> TensorSections:
    return infer_tensor_parallelism(load_subject(REFERENCE))


def _plan(subject: Subject, sections: TensorSections) -> Plan:
    fields = {name: tuple(entries) for name, entries in vars(sections).items()}
    return Plan(subject=subject.name, module_class="tests.Model", **fields)


def test_roles_and_parts() -> None:
    sections = _sections()
    attention, hidden, side = "blocks.attn", "blocks.ff", "blocks.ff.side"
    linears = {entry.module: entry for entry in sections.linears}
    assert {path: entry.role for path, entry in linears.items()} == {
        "blocks.*.attn.qkv": "column",
        "blocks.*.attn.out": "row",
        "blocks.*.ff.up": "column",
        "blocks.*.ff.side": "column",
        "blocks.*.ff.down": "row",
        "blocks.*.modulation": "gathered",
    }
    assert not sections.refused
    qkv = linears["blocks.*.attn.qkv"].channels
    assert [(rule.units, rule.repeat) for rule in qkv] == [(attention, 1), (attention, 2)]
    assert linears["blocks.*.ff.up"].channels == (ChannelRule(units=hidden),)
    assert [rule.units for rule in linears["blocks.*.ff.down"].channels] == [hidden, side]
    units = {unit.name: unit for unit in sections.units}
    assert units[attention].mixes_tokens and not units[hidden].mixes_tokens
    assert units[attention].count == "attn.kv_heads"


def test_norms_tables_and_values() -> None:
    sections = _sections()
    assert [(norm.module, norm.kind) for norm in sections.norms] == [("blocks.*.attn.norm", "rms")]
    tables = {(table.module, table.path, table.kind, table.dim) for table in sections.tables}
    assert tables == {("blocks.*", "table", "argument", 2), ("blocks.*.attn", "gate", "parameter", 0)}
    values = {(value.module, value.attribute) for value in sections.divided}
    assert values == {("blocks.*.attn", "inner_dim"), ("blocks.*.attn", "kv_heads")}


def test_plan_survives_its_file() -> None:
    plan = _plan(load_subject(REFERENCE), _sections())
    assert Plan.from_toml(plan.to_toml()) == plan


def test_a_wrong_value_is_not_accepted() -> None:
    """The trials of another configuration fail without the divided values."""
    from port_kit.autoparallel.tensor.analyze import analyze_block
    from port_kit.autoparallel.tensor.blocks import observe_blocks
    from port_kit.autoparallel.tensor.trial import record, try_rank

    subject = load_subject(REFERENCE)
    from port_kit.autoparallel.subject import TokenScale

    model = subject.build(ModelScale(heads=2))
    calls = observe_blocks(model, subject.inputs(TokenScale(), ModelScale(heads=2)))
    block, given = model.get_submodule("blocks.0"), calls.first["blocks.0"]
    split = analyze_block(block, given, set())
    recording = record(block, given, split.groups)
    assert try_rank(block, given, split.groups, recording, rank=0, ranks=2, values={}) is not None
    wrong = {(block.get_submodule("attn"), "head_dim"): 2}
    assert try_rank(block, given, split.groups, recording, rank=0, ranks=2, values=wrong) is not None


@pytest.mark.parametrize("degree", [3, 8])
def test_degrees_that_do_not_divide_the_units_are_refused(degree: int) -> None:
    from port_kit.autoparallel.tensor.apply import UnitSizes
    from port_kit.errors import ParallelError

    subject = load_subject(REFERENCE)
    plan = _plan(subject, _sections())
    sizes = UnitSizes(subject.build(ModelScale()), plan)
    with pytest.raises(ParallelError) as caught:
        for unit in plan.units:
            sizes.check(unit, degree)
    assert caught.value.code == "plan_degree"
