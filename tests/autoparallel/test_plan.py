"""Plan files: round trip, patterns, errors."""

from __future__ import annotations

import pytest
from torch import nn

from port_kit.autoparallel.plan import (
    AttentionSite,
    Blocks,
    ChannelRule,
    LinearPlan,
    Plan,
    Stream,
    TokenAxis,
    find,
    find_linears,
    generalize,
    matches,
)
from port_kit.errors import ParallelError

PLAN = Plan(
    subject="Model",
    module_class="package.Model",
    versions={"torch": "2"},
    streams=(Stream(name="image", grows_with=("image",)),),
    blocks=(Blocks(modules="blocks.*", inputs=(TokenAxis(path="x", dim=1, streams=("image",)),), gather="each"),),
    attention=(AttentionSite(module="blocks.*.attn", call=("processor.__call__", "sdpa"), queries=("image",)),),
    linears=(LinearPlan(module="blocks.*.ff", role="column", channels=(ChannelRule(units="blocks.ff", repeat=2),)),),
)


def _model() -> nn.Module:
    return nn.ModuleDict({"blocks": nn.ModuleList(nn.ModuleDict({"ff": nn.Linear(2, 2)}) for _ in range(3))})


def test_toml_round_trip() -> None:
    assert Plan.from_toml(PLAN.to_toml()) == PLAN


@pytest.mark.parametrize("text", ["x = ", "format = 1\n", 'subject = "a"\nmodule_class = "b"\nunknown = 1\n'])
def test_invalid_files_are_refused(text: str) -> None:
    with pytest.raises(ParallelError) as caught:
        Plan.from_toml(text)
    assert caught.value.code == "plan_file"


def test_patterns() -> None:
    assert matches("blocks.3.attn.to_out.0", "blocks.*.attn.to_out.0")
    assert not matches("blocks.3.attn.to_out", "blocks.*")
    assert generalize("blocks.3.attn.to_out.0") == "blocks.*.attn.to_out.0"
    assert generalize("norm_out") == "norm_out"
    assert list(find(_model(), "blocks.*.ff")) == ["blocks.0.ff", "blocks.1.ff", "blocks.2.ff"]


def test_pattern_without_a_module_is_an_error() -> None:
    with pytest.raises(ParallelError) as caught:
        PLAN.validate_for(_model())
    assert caught.value.code == "plan_pattern"


class _Block(nn.Module):
    """A block whose configuration may leave its attention out."""

    def __init__(self, attn: nn.Module | None) -> None:
        super().__init__()
        self.attn = attn


@pytest.mark.parametrize("pattern", ["blocks.*.attn", "blocks.*.attn.to_q"])
def test_a_pattern_may_name_what_the_configuration_leaves_out(pattern: str) -> None:
    model = nn.ModuleDict({"blocks": nn.ModuleList([_Block(None), _Block(None)])})
    assert find(model, pattern) == {}
    model["blocks"].append(_Block(nn.ModuleDict({"to_q": nn.Linear(2, 2)})))
    assert list(find(model, pattern)) == [pattern.replace("*", "2")]


@pytest.mark.parametrize("pattern", ["blocks.*.attention", "blocks.*.attn.to_k", "layers.*.attn", "blocks.*.ff"])
def test_any_other_pattern_without_a_module_is_an_error(pattern: str) -> None:
    blocks = [_Block(None), _Block(nn.ModuleDict({"to_q": nn.Linear(2, 2)}))]
    model = nn.ModuleDict({"blocks": nn.ModuleList(blocks)})
    for found in (find, lambda model, name: find_linears(model, LinearPlan(module=name, role="column"))):
        with pytest.raises(ParallelError) as caught:
            found(model, pattern)
        assert caught.value.code == "plan_pattern"
    assert find_linears(model, LinearPlan(module=pattern, role="gathered")) == {}
