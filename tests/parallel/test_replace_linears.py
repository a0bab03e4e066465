"""Linears exchanged by a table: every entry must mean linears, and a star crosses no dot."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from vllm.model_executor.layers.linear import ColumnParallelLinear, RowParallelLinear

from port_kit.errors import ParallelError
from port_kit.parallel.replace_linears import Role, matches, replace_linears
from port_kit.runtime.single_process import single_rank


def tree() -> nn.Module:
    """Two blocks of two linears, and a linear beside them."""
    blocks = [nn.ModuleDict({"up": nn.Linear(4, 8), "down": nn.Linear(8, 4, bias=False)}) for _ in range(2)]
    return nn.ModuleDict({"blocks": nn.ModuleList(blocks), "time": nn.Linear(4, 8), "norm": nn.LayerNorm(4)})


def test_linears_take_their_roles_and_keep_their_names() -> None:
    table: dict[str, Role] = {"blocks.*.up": "column", "blocks.*.down": "row", "time": "gathered"}
    with single_rank(torch.float32):
        module = tree()
        before = {name: value.shape for name, value in module.named_parameters()}
        replace_linears(module, table, None, "transformer")
    assert {name: value.shape for name, value in module.named_parameters()} == before
    kinds = {path: type(child) for path, child in module.named_modules()}
    assert kinds["blocks.1.up"] is ColumnParallelLinear and kinds["blocks.1.down"] is RowParallelLinear
    gathered = module.get_submodule("time")
    assert isinstance(gathered, ColumnParallelLinear) and gathered.gather_output


@pytest.mark.parametrize(
    ("entry", "found"), [("blocks.*.upp", "no module"), ("norm", "LayerNorm"), ("*.up", "no module")]
)
def test_an_entry_that_is_no_linear_is_refused(entry: str, found: str) -> None:
    with pytest.raises(ParallelError) as caught:
        replace_linears(tree(), {entry: "column"}, None, "transformer")
    assert caught.value.code == "parallel_table"
    assert caught.value.details == {"entry": entry, "found": [found]}


def test_a_star_is_one_part() -> None:
    assert matches("blocks.12.ff.net.2", "blocks.*.ff.net.2")
    assert not matches("blocks.12.ff.net.2", "blocks.*.2")
