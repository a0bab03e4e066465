"""Layouts of targets: owners that differ in one attribute have layouts of their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from port_kit.targets import read_targets


class Linear(nn.Module):
    """One rank's part of a column-parallel linear."""

    def __init__(self, **facts: Any) -> None:
        super().__init__()
        self.__dict__.update({"tp_rank": 0, "tp_size": 2, "input_size": 4, "input_size_per_partition": 4, **facts})
        self.weight = nn.Parameter(torch.zeros(8, 4), requires_grad=False)
        self.weight.output_dim = 0


PLAIN = {"output_size": 16, "output_size_per_partition": 8}
FUSED = {**PLAIN, "output_sizes": [8, 8]}


@pytest.mark.parametrize("other", [{"tp_rank": 1}, {"output_sizes": [4, 12]}, {"output_size": 8, "tp_size": 1}])
def test_owners_that_differ_in_one_number(other: dict[str, Any]) -> None:
    both = nn.ModuleList([Linear(**FUSED), Linear(**{**FUSED, **other}), Linear(**FUSED)])
    alone = [read_targets(Linear(**facts)).targets["weight"] for facts in (FUSED, {**FUSED, **other})]
    found = read_targets(both).targets
    for at, expected in zip(range(3), [alone[0], alone[1], alone[0]], strict=True):
        assert (found[f"{at}.weight"].spec, found[f"{at}.weight"].shards) == (expected.spec, expected.shards)
    assert alone[0].shards != alone[1].shards


def test_parameters_that_differ_in_one_attribute() -> None:
    both = nn.ModuleList([Linear(**PLAIN), Linear(**PLAIN)])
    both[1].weight.output_dim = 1
    shapes = [target.spec.shape for target in read_targets(both).targets.values()]
    assert shapes == [(16, 4), (8, 8)]


def test_an_owner_that_computes_its_sizes() -> None:
    """Owners with properties are read one by one: their attributes do not determine the values of properties."""

    class Computed(Linear):
        @property
        def output_size(self) -> int:
            return int(self.factor * 8)

    both = nn.ModuleList(
        [Computed(output_size_per_partition=8, factor=2), Computed(output_size_per_partition=8, factor=3)]
    )
    assert [target.spec.shape for target in read_targets(both).targets.values()] == [(16, 4), (24, 4)]


def test_every_parameter_keeps_its_own_loader() -> None:
    both = nn.ModuleList([Linear(**PLAIN), Linear(**PLAIN)])
    for at, linear in enumerate(both):
        linear.weight.weight_loader = lambda parameter, value, at=at: parameter.data.fill_(at + 1)
    for target in read_targets(both).targets.values():
        target.load("", torch.zeros(16, 4))
    assert [linear.weight[0, 0].item() for linear in both] == [1, 2]
