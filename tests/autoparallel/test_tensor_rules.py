"""Segments, sizes, and the rules that put channels in rank order."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from port_kit.autoparallel.tensor.apply import Applied
from port_kit.autoparallel.tensor.groups import Segment, parse_segments
from port_kit.autoparallel.tensor.layers import local_part
from port_kit.autoparallel.tensor.sizes import evaluate, fit, numbers
from port_kit.autoparallel.tensor.weights import rank_order, weight_rules
from port_kit.errors import ParallelError
from port_kit.manifest import Manifest, TensorSpec


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([(0, 0), (0, 0), (0, 1), (0, 1)], (Segment(0, 4, 2),)),
        ([(0, 0), (0, 1), (0, 0), (0, 1)], (Segment(0, 2, 1), Segment(0, 2, 1))),
        ([(1, 0), (1, 0), (1, 1), (1, 1), (0, 0), (0, 1)], (Segment(1, 4, 2), Segment(0, 2, 1))),
        ([(0, 1), (0, 0)], None),
        ([(0, 0), (0, 0), (0, 1)], None),
        ([(0, 0)], None),
    ],
    ids=["heads", "halves", "fused", "descending", "uneven", "incomplete"],
)
def test_segments(labels: list[tuple[int, int]], expected: tuple[Segment, ...] | None) -> None:
    assert parse_segments(labels, [2, 2]) == expected


class _Block(nn.Module):
    def __init__(self, heads: int, head_dim: int, hidden: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        self.ff = nn.Linear(4, hidden)


def test_sizes_are_expressions_that_hold_for_all_configurations() -> None:
    blocks = [_Block(4, 8, 96), _Block(8, 8, 192), _Block(4, 16, 192)]
    tables = [numbers(block) for block in blocks]
    assert fit([4, 8, 4], tables, "x")[0] == "heads"
    product = fit([32, 64, 64], tables, "x")
    assert "heads*head_dim" in product
    assert fit([5, 6, 7], tables, "x") == []
    assert [evaluate("ff.out_features//3", block) for block in blocks] == [32, 64, 64]
    with pytest.raises(ParallelError) as caught:
        evaluate("heads*missing", blocks[0])
    assert caught.value.code == "plan_expression"


def test_rank_order_makes_each_ranks_part_consecutive() -> None:
    parts, ranks = (8, 4, 4), 2
    whole = torch.arange(16)
    ordered = torch.cat([whole[start:stop] for start, stop in rank_order(parts, ranks)])
    for rank in range(ranks):
        assert torch.equal(ordered.chunk(ranks)[rank], local_part(whole, 0, parts, rank, ranks))


def test_rules_reorder_only_what_has_several_parts() -> None:
    applied = Applied(2, {"b.0.up.weight": (0, (4, 4)), "b.1.up.weight": (0, (4, 4)), "b.0.out.weight": (1, (8,))})
    rules = weight_rules(applied, "test")
    assert [rule.source for rule in rules] == [r"(b\.[^.]+\.up\.weight)", "(.+)"]
    names = {name: TensorSpec((8, 8), "float32") for name in applied.parts}
    plan = rules.compile(Manifest(names), Manifest(names))
    assert set(plan.target) == set(names)
