"""Tensor parallelism: complete shards through the parameters' loaders, or only this rank's part from the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from port_kit.errors import RemapError
from port_kit.manifest import Manifest
from port_kit.remap import Op, Rule, RuleSet, load_weights
from port_kit.remap.load import WeightLoader
from port_kit.remap.local import load_local
from port_kit.targets import read_targets
from tests.helpers import raises
from tests.remap.linears import Linear

RULES = RuleSet(
    "tp",
    (
        Rule(r"b\.(q|k|v)\.weight", "qkv.weight", shard=r"\1"),
        Rule(r"b\.gate_up\.weight", ("gu.weight", "gu.weight"), shard=("1", "0"), op=Op.of("split", dim=0)),
        Rule(r"b\.o\.weight", "o.weight"),
        Rule(r"b\.up\.weight", "up.weight", op="transpose"),
        Rule(r"b\.conv\.weight", "conv.weight", op=Op.of("rearrange", pattern="o i k -> o (i k)")),
        Rule(r"b\.norm\.weight", "norm.weight"),
        Rule(r"b\.swap\.weight", "swap.weight", op=Op.of("reorder", dim=0)),
    ),
)
TENSORS = {
    "b.q.weight": (8, 6),
    "b.k.weight": (2, 6),
    "b.v.weight": (2, 6),
    "b.gate_up.weight": (8, 6),
    "b.o.weight": (6, 8),
    "b.up.weight": (6, 8),
    "b.conv.weight": (4, 3, 2),
    "b.norm.weight": (8,),
    "b.swap.weight": (4, 6),
}


class Norm(nn.Module):
    """A norm whose weight only its own loader knows how to split."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__()
        self.tp_rank, self.tp_size = rank, size
        self.weight = nn.Parameter(torch.full((8 // size,), float("nan")), requires_grad=False)
        self.weight.weight_loader = self.load

    def load(self: Any, parameter: nn.Parameter, tensor: torch.Tensor) -> None:
        count = parameter.shape[0]
        parameter.data.copy_(tensor[self.tp_rank * count : (self.tp_rank + 1) * count])


def module(rank: int, size: int) -> nn.Module:
    return nn.ModuleDict(
        {
            "qkv": Linear("qkv", 6, [8, 2, 2], rank, size, kv=2),
            "gu": Linear("merged", 6, [4, 4], rank, size),
            "o": Linear("row", 8, [6], rank, size),
            "up": Linear("column", 6, [8], rank, size),
            "conv": Linear("column", 6, [4], rank, size),
            "swap": Linear("column", 6, [4], rank, size),
            "norm": Norm(rank, size),
        }
    )


@pytest.fixture
def checkpoint(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    tensors = {name: torch.randn(shape) for name, shape in TENSORS.items()}
    half = len(tensors) // 2
    for part, names in enumerate((list(tensors)[:half], list(tensors)[half:])):
        save_file({name: tensors[name] for name in names}, tmp_path / f"model-{part}.safetensors")
    return tmp_path, tensors


@pytest.mark.parametrize("size", [1, 2, 4])
def test_ranks_hold_the_whole_and_read_only_their_part(checkpoint: tuple, size: int) -> None:
    folder, tensors = checkpoint
    one = module(0, 1)
    load_weights(one, tensors.items(), RULES)
    assert torch.equal(one["qkv"].weight, torch.cat([tensors[f"b.{p}.weight"] for p in "qkv"]))
    assert torch.equal(one["gu"].weight, torch.cat([tensors["b.gate_up.weight"][4:], tensors["b.gate_up.weight"][:4]]))
    read = 0
    for rank in range(size):
        streamed, local = module(rank, size), module(rank, size)
        names = load_weights(streamed, tensors.items(), RULES)
        done = load_local(local, folder, RULES)
        assert done.loaded == names
        for name, parameter in streamed.named_parameters():
            assert torch.equal(parameter, local.get_parameter(name)), name
        read += done.bytes_read
        assert set(done.read_whole) <= {"b.norm.weight"}
    extra = (size - 1) * 4 * 8  # the norm, which only its own loader can split, is read completely by every rank
    replicated = {4: 2 * 2 * 6 * 2 * 4 // 2}.get(size, 0)  # each of 2 key heads on 2 ranks
    assert read == sum(tensor.nbytes for tensor in tensors.values()) + extra + replicated


@pytest.mark.parametrize("size", [1, 2])
def test_manifests_of_sharded_modules_have_whole_shapes(size: int) -> None:
    manifest = Manifest.from_module(module(size - 1, size))
    assert manifest["qkv.weight"].shape == (12, 6)
    assert manifest["qkv.weight"].slots == {
        "q": ((0, 8), (0, 6)),
        "k": ((8, 10), (0, 6)),
        "v": ((10, 12), (0, 6)),
    }
    assert manifest["o.weight"].shape == (6, 8) and manifest["up.weight"].shape == (8, 6)


class Second(nn.Module):
    """A second set of weights in a plain container; it has the extents of the linear whose loader it borrows."""

    def __init__(self, lender: Linear) -> None:
        super().__init__()
        self.tp_rank, self.tp_size = lender.tp_rank, lender.tp_size
        self.output_size, self.output_size_per_partition = lender.output_size, lender.output_size_per_partition
        self.input_size = self.input_size_per_partition = lender.input_size
        self.weight = nn.Parameter(torch.full_like(lender.weight, float("nan")), requires_grad=False)
        self.weight.output_dim, self.weight.input_dim = 0, 1
        self.weight.weight_loader = lender.load


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_second_set_of_weights_has_the_slots_of_its_lender(checkpoint: tuple, size: int) -> None:
    folder, tensors = checkpoint
    kept = RuleSet("second", (RULES.rules[0], Rule(r"b\.(?!q|k|v).*", drop="not of this module")))
    for rank in range(size):
        lender = Linear("qkv", 6, [8, 2, 2], rank, size, kv=2)
        own, streamed, local = (nn.ModuleDict({"qkv": part}) for part in (lender, Second(lender), Second(lender)))
        assert Manifest.from_module(streamed)["qkv.weight"] == Manifest.from_module(own)["qkv.weight"]
        for module, load in ((own, tensors.items()), (streamed, tensors.items())):
            load_weights(module, load, kept)
        load_local(local, folder, kept)
        assert torch.equal(streamed["qkv"].weight, own["qkv"].weight)
        assert torch.equal(local["qkv"].weight, own["qkv"].weight)


class Told(Linear):
    """A linear whose rank is not among its own attributes."""

    tp_rank = property(lambda self: self.ranks[-1], lambda self, rank: setattr(self, "ranks", [rank]))


def odd_linears() -> dict[str, nn.Module]:
    """Linears whose parameters look the same, though they hold different parts."""
    told = Told("column", 6, [16], 0, 2)
    told.tp_rank = 1
    return {
        "first": Linear("qkv", 6, [8, 4, 4], 0, 2, kv=4),
        "second": Linear("qkv", 6, [8, 4, 4], 1, 2, kv=4),
        "merged": Linear("merged", 6, [8, 8], 1, 2),
        "other": Linear("merged", 6, [10, 6], 1, 2),
        "three": Linear("merged", 6, [10, 4, 2], 1, 2),
        "column": Linear("column", 6, [16], 0, 2),
        "alone": Linear("column", 6, [8], 0, 1),
        "row": Linear("row", 12, [8], 1, 2),
        "told": told,
        "borrowed": Second(Linear("merged", 6, [4, 12], 1, 2)),
    }


def test_linears_that_differ_in_one_number_are_told_apart() -> None:
    layer = odd_linears()
    together = read_targets(nn.ModuleDict(layer)).targets
    assert len({target.shards for target in together.values()}) == len(layer)
    for name, linear in layer.items():
        found, alone = together[f"{name}.weight"], read_targets(linear).targets["weight"]
        assert found.tensor.shape == (8, 6) and found.loader == alone.loader is not None
        assert (found.shards, found.spec, found.spec.slots) == (alone.shards, alone.spec, alone.spec.slots)


def test_a_gap_is_found_before_anything_is_read(checkpoint: tuple) -> None:
    folder, _ = checkpoint
    others = [rule for rule in RULES if rule.source != r"b\.o\.weight"]
    with raises("remap_failed", "b.o.weight"):
        load_local(module(0, 2), folder, RuleSet("tp", others))


def test_an_own_loader_is_stretched_by_its_ranks_only(checkpoint: tuple) -> None:
    _, tensors = checkpoint
    tensors["b.norm.weight"] = torch.zeros(16)
    with pytest.raises(RemapError) as caught:
        load_weights(module(0, 2), tensors.items(), RULES)
    assert caught.value.code == "remap_shape"


def test_a_missing_slot_is_never_loaded(checkpoint: tuple) -> None:
    _, tensors = checkpoint
    del tensors["b.k.weight"]
    with raises("remap_incomplete_group", "b.k.weight"):
        load_weights(module(0, 1), tensors.items(), RULES)


@pytest.mark.parametrize(("dtype", "into"), [("bfloat16", "bfloat16"), ("float32", "float32"), ("float32", "bfloat16")])
@pytest.mark.parametrize("threads", [1, 3])
def test_threads_share_the_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, into: str, threads: int
) -> None:
    monkeypatch.setattr("port_kit.remap.local.BLOCK", 1000)  # many blocks
    rules = RuleSet("big", (Rule(r"b\.(q|k|v)", "qkv.weight", shard=r"\1"), Rule(r"b\.o", "o.weight")))
    shapes = {"b.q": (128, 65), "b.k": (32, 65), "b.v": (32, 65), "b.o": (65, 128)}
    tensors = {name: torch.randn(shape).to(getattr(torch, dtype)) for name, shape in shapes.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    for rank in (0, 1):
        parts = {"qkv": Linear("qkv", 65, [128, 32, 32], rank, 2, kv=32), "o": Linear("row", 128, [65], rank, 2)}
        half = nn.ModuleDict(parts).to(getattr(torch, into))
        done = load_local(half, tmp_path, rules, threads=threads)
        rows = [tensors[name].chunk(2)[rank] for name in ("b.q", "b.k", "b.v")]
        assert torch.equal(half["qkv"].weight, torch.cat(rows).to(half["qkv"].weight.dtype))
        assert torch.equal(half["o"].weight, tensors["b.o"].chunk(2, 1)[rank].to(half["o"].weight.dtype))
        assert done.bytes_read * 2 == done.bytes_whole


def test_no_threads_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="threads=0"):
        load_local(nn.Module(), tmp_path, RULES, threads=0)


@pytest.mark.parametrize("known", [True, False])
def test_a_part_of_a_concat_is_placed_at_once_if_headers_are_known(tmp_path: Path, known: bool) -> None:
    widths = {"a": 2, "b": 6, "c": 4}  # c has the mean width, which does not prove its offset
    tensors = {name: torch.randn(width, 3) for name, width in widths.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    joined = Op.of("concat", dim=0, parts=("a", "b", "c"))
    whole = nn.Module()
    whole.weight = nn.Parameter(torch.zeros(12, 3))
    rules = RuleSet("joined", (Rule(r"(a|b|c)", "weight", shard=r"\1", op=joined),))
    loader = WeightLoader(whole, rules, folder=tmp_path if known else None)
    loader.feed("c", tensors["c"])
    assert torch.equal(whole.weight[8:], tensors["c"]) is known
    loader.feed("a", tensors["a"])
    loader.feed("b", tensors["b"])
    assert loader.finish() == {"weight"}
    assert torch.equal(whole.weight, torch.cat([tensors[name] for name in "abc"]))
