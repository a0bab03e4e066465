"""Names only: the mapper agrees with the rules name by name, in any order, and offers vLLM's methods."""

from __future__ import annotations

import random

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from port_kit.remap import Op, Rule, RuleSet
from port_kit.remap.mapper import NameMapper, stacked_params_mapping
from port_kit.remap.names import collapse, expand, parse_ranges, ranges

RULES = RuleSet(
    "dit",
    (
        Rule(r"blocks\.(\d+)\.attn\.(q|k|v)\.(\w+)", r"layers.\1.attn.qkv.\3", shard=r"\2"),
        Rule(r"blocks\.(\d+)\.ffn\.0\.(\w+)", r"layers.\1.ffn.up.\2"),
        Rule(r"blocks\.(\d+)\.ffn\.2\.(\w+)", r"layers.\1.ffn.down.\2"),
        Rule(r"blocks\.(\d+)\.shift", r"layers.{\1 + 1}.shift"),
        Rule(r"blocks\.7\.only", "seven"),
        Rule(r"model\.deep\.(\d+)\.moe\.(\d+)\.w", r"deep.\1.experts.\2.w"),
        Rule(r"ema\.(.*)", drop="a second copy"),
        Rule(r"fused\.(\d+)\.qkv", (r"\1.q", r"\1.k"), op=Op.of("split", dim=0)),
    ),
)
EXPECTED = {
    "blocks.3.attn.q.weight": ("layers.3.attn.qkv.weight", "q"),
    "blocks.12.attn.v.bias": ("layers.12.attn.qkv.bias", "v"),
    "blocks.0.ffn.0.weight": ("layers.0.ffn.up.weight", ""),
    "blocks.11.ffn.2.weight": ("layers.11.ffn.down.weight", ""),
    "blocks.11.ffn.1.weight": ("blocks.11.ffn.1.weight", ""),
    "blocks.4.shift": ("layers.5.shift", ""),
    "blocks.7.only": ("seven", ""),
    "blocks.8.only": ("blocks.8.only", ""),
    "model.deep.4.moe.17.w": ("deep.4.experts.17.w", ""),
    "ema.blocks.3.attn.q.weight": None,
    "fused.5.qkv": ("5.q", ""),
    "blocks.3.attn.q": ("layers.3.attn.qkv", "q"),
    "": ("", ""),
    "...": ("...", ""),
}


def test_names_and_slots() -> None:
    mapper = NameMapper(RULES)
    assert {name: mapper.map(name) for name in EXPECTED} == EXPECTED


@settings(max_examples=30, deadline=None)
@given(st.randoms(use_true_random=False))
def test_lists_agree_with_single_names_in_any_order(rng: random.Random) -> None:
    names = [name.replace("3", str(n)).replace("4", str(n)) for n in range(12) for name in EXPECTED]
    if rng.random() < 0.7:
        rng.shuffle(names)
    single = [NameMapper(RULES).map(name) for name in names]
    assert NameMapper(RULES).apply_list(names) == [found[0] for found in single if found is not None]
    assert NameMapper(RULES).map_all(names) == single


def test_the_methods_of_vllms_mapper() -> None:
    mapper = NameMapper(RULES)
    [(name, tensor)] = mapper.apply([("blocks.3.attn.q.weight", torch.zeros(1)), ("ema.x", torch.zeros(1))])
    assert name == "layers.3.attn.qkv.weight" and tensor.shard_id == "q"
    assert mapper.apply_dict({"blocks.1.ffn.0.bias": 1, "ema.x": 2}) == {"layers.1.ffn.up.bias": 1}
    renames = mapper.get_rename_mapper()
    assert renames.apply_list(["blocks.3.attn.q", "blocks.3.attn.k.weight", "ema.x"]) == [
        "layers.3.attn.q",
        "layers.3.attn.k.weight",
        "ema.x",
    ]


def test_stacked_params_mapping_for_lora() -> None:
    names = [f"blocks.{n}.attn.{p}.weight" for n in range(2) for p in "qkvo"]
    assert stacked_params_mapping(RULES, names) == [(".qkv", ".q", "q"), (".qkv", ".k", "k"), (".qkv", ".v", "v")]


def test_names_collapse_and_expand() -> None:
    names = [f"blocks.{n}.ffn.{m}.weight" for n in range(30) for m in (0, 2)]
    assert collapse(names) == ["blocks.{0..29}.ffn.{0,2}.weight"]
    assert collapse(["a.1", "a.2.b", "a.4.b", "c"]) == ["a.1", "a.{2,4}.b", "c"]
    assert expand("blocks.#.ffn.#.weight", [range(30), [0, 2]]) == names
    assert parse_ranges(ranges([5, 1, 2, 3, 9])) == [1, 2, 3, 5, 9]
