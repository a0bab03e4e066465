"""Outputs of modules, collected by hooks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from port_kit.parity.hooks import outputs_of
from tests.helpers import raises


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(2, 2) for _ in range(2))
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Call the first block twice."""
        return self.blocks[0](self.blocks[1](self.blocks[0](x)))


def test_outputs_in_the_order_of_calls() -> None:
    model, x = Model(), torch.ones(1, 2)
    with outputs_of(model, ["blocks.1", "blocks.0"]) as found:
        result = model(x)
    first = model.blocks[0](x)
    assert list(found) == ["blocks.0", "blocks.1", "blocks.0#2"]
    assert torch.equal(found["blocks.0"], first) and torch.equal(found["blocks.0#2"], result)
    assert torch.equal(found["blocks.1"], model.blocks[1](first))
    model(2 * x)
    assert torch.equal(found["blocks.0"], first), "hooks are removed"


def test_modules_that_do_not_exist_or_are_not_called() -> None:
    model = Model()
    with raises("parity_module", "blocks.2"), outputs_of(model, ["blocks.2"]):
        pass
    with raises("parity_module", "unused"), outputs_of(model, ["unused"]):
        model(torch.ones(1, 2))
