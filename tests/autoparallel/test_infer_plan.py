"""Inference of complete plans: one kind of parallelism that fails, and lists of blocks."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

from port_kit.autoparallel.block_lists import declare_hsdp, list_blocks, with_complete_modules
from port_kit.autoparallel.infer import infer_plan
from port_kit.autoparallel.plan import Plan
from port_kit.autoparallel.subject import ModelScale, TokenScale, load_subject
from port_kit.autoparallel.tensor.blocks import observe_blocks
from port_kit.autoparallel.tensor.trace import Connections, trace

CUSTOM = "tests.autoparallel.custom_subject:subject"


class Model(nn.Module):
    """Blocks of which code outside calls one part of one block."""

    def __init__(self, caller: int) -> None:
        super().__init__()
        self.caller = caller
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``x`` after all layers, and after a part of one."""
        for layer in self.layers:
            x = layer(x)
        return self.layers.get_submodule(f"{self.caller}.1")(x)


@pytest.mark.parametrize(("caller", "complete"), [(0, "layers.0.1"), (2, "layers.*.1")])
def test_modules_called_from_outside_stay_complete_under_hsdp(caller: int, complete: str) -> None:
    model = Model(caller)
    calls = observe_blocks(model, {"x": torch.ones(1, 4)})
    (blocks,) = with_complete_modules(list_blocks(model, calls), model, calls)
    assert (blocks.modules, blocks.complete) == ("layers.*", (complete,))
    plan = Plan.from_toml(Plan(subject="s", module_class="c", blocks=(blocks,)).to_toml())
    plan.validate_for(model)
    declare_hsdp(model, plan)
    ignored: Any = model._hsdp_ignored_modules
    assert f"layers.{caller}.1" in ignored and len(ignored) == (1 if caller == 0 else 3)


def test_a_kind_of_parallelism_that_fails_is_refused_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs of the second number of tokens fail: the inference of tokens stops, the lists of blocks remain."""
    subject = load_subject(CUSTOM)

    def inputs(tokens: TokenScale, model: ModelScale | None = None) -> dict[str, Any]:
        if tokens.masked:
            raise RuntimeError("no masks")
        return subject.inputs(tokens, model) if model else subject.inputs(tokens)

    monkeypatch.setattr(torch, "set_num_threads", (threads := []).append)
    plan = infer_plan(dataclasses.replace(subject, inputs=inputs))
    assert threads[0] == 1 and threads[-1] == torch.get_num_threads()
    assert [refusal.kind for refusal in plan.refused] == ["sequence"]
    assert "no masks" in plan.refused[0].reason
    assert {linear.role for linear in plan.linears} and [blocks.modules for blocks in plan.blocks] == ["blocks.*"]


def test_gradients_of_a_block_without_inputs_are_none() -> None:
    """A norm of a parameter has neither a linear nor an argument before it."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.norm = nn.Parameter(torch.ones(1, 4)), nn.LayerNorm(4)

        def forward(self) -> torch.Tensor:
            return self.norm(self.query)

    found = Connections()
    trace(Block(), ((), {}), skip=set(), cut=set(), probe={"norm"}, seed=0, into=found)
    assert found.one_to_one == {"norm"}
