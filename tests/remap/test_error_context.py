"""Expected names of missing tensors, from inverted rules."""

from __future__ import annotations

import pytest

from port_kit.manifest import Manifest, TensorSpec
from port_kit.remap import Op, Rule, RuleSet
from port_kit.remap.error_context import expected_sources
from port_kit.remap.plan import check

RULES = RuleSet(
    "small",
    (
        Rule(r"(video|audio)\.layers\.(\d+)\.(q|k|v)\.(weight|bias)", r"blocks.\2.\1.qkv.\4", shard=r"\3"),
        Rule(r"net\.(?P<layer>\d+)\.down(_1)?\.weight", r"net.\g<layer>.down.weight"),
        Rule(r"flat\.(\d+)\.weight", r"nested.{\1 // 2}.{\1 % 2}.weight"),
        Rule(r"conv\.weight_(g|v)", r"conv.weight", shard=r"\1", op=Op.of("weight_norm", dim=0)),
        Rule(r"old\.(.*)", drop="not used"),
    ),
)


@pytest.mark.parametrize(
    ("target", "part", "names"),
    [
        ("blocks.7.audio.qkv.bias", "k", ["audio.layers.7.k.bias"]),
        ("net.3.down.weight", "", ["net.3.down_1.weight", "net.3.down.weight"]),
        ("nested.4.1.weight", "", ["flat.9.weight"]),
        ("conv.weight", "v", ["conv.weight_v"]),
        ("blocks.7.text.qkv.bias", "k", []),
        ("nothing.weight", "", []),
    ],
)
def test_the_names_that_would_fill_a_target(target: str, part: str, names: list[str]) -> None:
    assert expected_sources(RULES, target, part, {}) == names


def test_an_absent_part_is_named_with_its_file_and_the_name_that_came_instead() -> None:
    spec = TensorSpec((4, 4), "float32", file="b.safetensors")
    source = Manifest({f"video.layers.{layer}.{slot}.weight": spec for layer in range(2) for slot in "qkv"})
    entries = dict(source.items())
    entries["video.layers.1.kay.weight"] = entries.pop("video.layers.1.k.weight")
    slots = {"q": ((0, 4), (0, 4)), "k": ((4, 8), (0, 4)), "v": ((8, 12), (0, 4))}
    target = Manifest(
        {f"blocks.{layer}.video.qkv.weight": TensorSpec((12, 4), "float32", slots=slots) for layer in (0, 1)}
    )
    rules = RuleSet("small", RULES.rules[:1])
    stranger, group = check(rules, Manifest(entries), target, {}).explained()
    assert stranger.near == "video.layers.1.k.weight"
    assert "video.layers.1.k.weight is missing from b.safetensors" in group.message
    assert (group.missing, group.near) == (("k",), "video.layers.1.kay.weight")
