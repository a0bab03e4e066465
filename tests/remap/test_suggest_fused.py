"""Suggestions for parts that are fused or stacked and have other axes than the whole, in both directions, by values."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from port_kit.remap.export import convert
from port_kit.remap.suggest import suggest
from tests.remap.shapes import manifest_of

Shape = tuple[int, ...]
LAYERS = range(2)

#: (rows of q, k and v), columns of the parts, columns of the whole
FUSED = {
    "convolutions of one step": ((8, 8, 8), (6, 1), (6,)),
    "convolutions in two dimensions": ((8, 8, 8), (6, 1, 1), (6,)),
    "a convolution of linears": ((8, 8, 8), (6,), (6, 1)),
    "another number of unit axes": ((8, 8, 8), (6, 1, 1), (6, 1)),
    "patches": ((8, 8, 8), (3, 2, 2), (12,)),
    "patches of a linear": ((8, 8, 8), (12,), (3, 2, 2)),
    "fewer heads of keys": ((8, 4, 4), (6, 1), (6,)),
    "fewer heads of keys, patches": ((8, 4, 4), (12,), (3, 2, 2)),
}
#: shape of one expert's tensor, columns of the stack
STACKED = {
    "experts with a unit axis": ((8, 6, 1), (6,)),
    "a stack with a unit axis": ((8, 6), (6, 1)),
    "experts with patches": ((8, 3, 2), (3, 2)),
}


def assert_converts(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    """Convert values by the rules that are suggested for names and shapes alone."""
    given, wanted = (manifest_of({name: tuple(t.shape) for name, t in side.items()}) for side in (source, target))
    found = dict(convert(suggest(given, wanted).rules.compile(given, wanted), dict(source)))
    assert found.keys() == target.keys()
    for name, tensor in target.items():
        assert torch.equal(found[name], tensor), name


def fused(rows: Mapping[str, int], columns: Mapping[str, Shape], whole: Shape) -> tuple[dict[str, Tensor], ...]:
    """Return the parts and the wholes of some layers, with biases."""
    parts: dict[str, Tensor] = {}
    wholes: dict[str, Tensor] = {}
    for layer in LAYERS:
        at = f"blocks.{layer}.attn"
        weights = {name: torch.randn(count, *columns[name]) for name, count in rows.items()}
        biases = {name: torch.randn(count) for name, count in rows.items()}
        parts |= {f"{at}.{name}.weight": weight for name, weight in weights.items()}
        parts |= {f"{at}.{name}.bias": bias for name, bias in biases.items()}
        joined = [weight.reshape(len(weight), *whole) for weight in weights.values()]
        wholes |= {f"{at}.qkv.weight": torch.cat(joined), f"{at}.qkv.bias": torch.cat(list(biases.values()))}
    return parts, wholes


@pytest.mark.parametrize(("rows", "part", "whole"), FUSED.values(), ids=FUSED)
def test_parts_are_fused_and_reshaped_both_ways(rows: Shape, part: Shape, whole: Shape) -> None:
    parts, wholes = fused(dict(zip("qkv", rows, strict=True)), dict.fromkeys("qkv", part), whole)
    assert_converts(parts, wholes)
    assert_converts(wholes, parts)


@pytest.mark.parametrize("odd", "qkv")
def test_only_some_of_the_parts_are_reshaped(odd: str) -> None:
    parts, wholes = fused(dict.fromkeys("qkv", 8), {**dict.fromkeys("qkv", (6,)), odd: (6, 1)}, (6,))
    assert_converts(parts, wholes)
    assert_converts(wholes, parts)


@pytest.mark.parametrize(("part", "whole"), STACKED.values(), ids=STACKED)
@pytest.mark.parametrize("names", [("up",), ("gate", "up")])
def test_experts_are_stacked_and_reshaped_both_ways(names: tuple[str, ...], part: Shape, whole: Shape) -> None:
    parts: dict[str, Tensor] = {}
    wholes: dict[str, Tensor] = {}
    for layer in LAYERS:
        experts = [{name: torch.randn(part) for name in names} for _ in range(4)]
        for number, expert in enumerate(experts):
            parts |= {f"l.{layer}.experts.{number}.{name}_proj.weight": value for name, value in expert.items()}
        rows = [torch.cat([value.reshape(len(value), *whole) for value in expert.values()]) for expert in experts]
        wholes[f"l.{layer}.experts.{'_'.join(names)}_proj"] = torch.stack(rows)
    assert_converts(parts, wholes)
    assert_converts(wholes, parts)


def test_parts_with_other_numbers_of_columns_are_not_fused() -> None:
    given = {f"blocks.{layer}.attn.{part}.weight": (8, 6, 1) for layer in LAYERS for part in "qkv"}
    source = manifest_of({name: (*shape[:1], 5, 1) if ".q." in name else shape for name, shape in given.items()})
    target = manifest_of({f"blocks.{layer}.attn.qkv.weight": (24, 6) for layer in LAYERS})
    assert set(suggest(source, target).missing) == set(target)
