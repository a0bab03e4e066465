"""Imported and exported mappings against the libraries themselves: the same names, shards and values."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    Interleave,
    MergeModulelist,
    PermuteForRope,
    Transpose,
    WeightConverter,
    WeightRenaming,
)
from vllm.model_executor.models.utils import WeightsMapper

from port_kit.errors import RemapError
from port_kit.interop.exports import export_mapping
from port_kit.interop.imports import import_mapping, read_mapping
from port_kit.manifest import Manifest
from port_kit.remap import Rule, RuleSet
from port_kit.remap.export import convert
from tests.helpers import raises
from tests.remap.conversions import conversion, rule_set
from tests.remap.library_mappings import assert_same, by_rules, by_transformers, by_vllm, mapped, names_for, numbered
from tests.remap.loader_equivalence import manifest_of, random_checkpoint

MODELS = "qwen2_vl qwen2_5_vl llava clip siglip whisper llama aria blip granitemoe bert phi3v gpt_j falcon_h1".split()


def shapes(names: list[str]) -> Manifest:
    return manifest_of(numbered(names))


def refusal(mapping: object, names: list[str] | None = None) -> dict[str, str]:
    """The entries that are refused, with the reasons."""
    with pytest.raises(RemapError) as caught:
        import_mapping(mapping, None if names is None else shapes(names))
    assert caught.value.code == "remap_interop" and caught.value.hint
    refused = caught.value.details["refused"]
    assert isinstance(refused, dict)
    return refused


# -- transformers --------------------------------------------------------------------------------------------------


def distinct(transforms: list[Any]) -> dict[str, torch.Tensor]:
    """Tensors for names that the transforms match, without those that land on the target of another name."""
    tensors = numbered(names_for(transforms))
    while True:
        try:
            by_transformers(transforms, tensors)
            return tensors
        except FileExistsError as error:
            del tensors[str(error)]


#: Ops of transformers that depend on the model's configuration or on the module.
CONFIGURED = {"PermuteForRope", "VisionUnfuseAndPermuteForRope", "ErnieFuseAndSplitTextVisionExperts"}


def depends_on_the_model(transforms: list[Any]) -> bool:
    """Whether a list of transforms has an op without an equivalent in rules."""
    ops = [op for item in transforms if isinstance(item, WeightConverter) for op in item.operations]
    return any(type(op).__name__ in CONFIGURED or getattr(op, "check_dims", False) for op in ops)


def test_transformers_registry_is_expressible_unless_an_op_depends_on_the_model() -> None:
    from transformers.conversion_mapping import _build_checkpoint_conversion_mapping

    expressed = 0
    for transforms in _build_checkpoint_conversion_mapping().values():
        names = names_for(transforms)
        if depends_on_the_model(transforms):
            assert all(re.search("has no equivalent|depends on", why) for why in refusal(transforms, names).values())
            continue
        import_mapping(transforms, shapes(names))
        tensors = distinct(transforms)
        expected = by_transformers(transforms, tensors)
        rules = import_mapping(transforms, manifest_of(tensors))
        assert_same(by_rules(rules, tensors, expected), expected)
        expressed += 1
    assert expressed >= 186


def test_mixtral_is_its_true_conversion() -> None:
    true = conversion("hf_mixtral")
    plan = import_mapping(read_mapping("transformers:mixtral"), true.source).compile(true.source, true.target)
    expected = rule_set("hf_mixtral").compile(true.source, true.target)
    tensors = random_checkpoint(true.source)
    assert_same(dict(convert(plan, tensors)), dict(convert(expected, tensors)))


EXPERTS = [f"l.{layer}.e.{expert}.{leaf}" for layer in range(2) for expert in range(11) for leaf in ("gate", "up")]


@pytest.mark.parametrize(
    ("transforms", "names"),
    [
        ([WeightConverter("e.*.gate", "experts", [MergeModulelist(dim=1)])], EXPERTS[::2]),
        ([WeightConverter(["e.*.gate", "e.*.up"], "experts", [MergeModulelist(0), Concatenate(1)])], EXPERTS),
        ([WeightConverter(["e.*.gate", "e.*.up"], "experts", [MergeModulelist(1), Concatenate(0)])], EXPERTS),
        ([WeightConverter(["e.*.gate", "e.*.up"], "experts", [MergeModulelist(0), Concatenate(-1)])], EXPERTS),
        ([WeightConverter(["q", "k", "v"], "qkv", [Concatenate(1)])], ["a.0.q", "a.0.k", "a.0.v", "a.1.q", "a.1.v"]),
        ([WeightConverter("qkv", ["q", "k", "v"], [Chunk(0)])], ["a.0.qkv.w", "a.1.qkv.w"]),
        ([WeightConverter("qkv", ["q", "k"], [Interleave(1), Chunk(1)])], ["a.0.qkv.w"]),
        ([WeightConverter("w", "v", [Interleave(0, inverse=True)])], ["a.0.w"]),
        ([WeightConverter("w", "v", [Transpose(0, 1)])], ["a.0.w"]),
        ([WeightRenaming("a.(\\d+)", r"b.\1.c"), WeightRenaming("b", "bb")], ["a.0.a.1.w", "a.7.w", "b.b"]),
        ([WeightRenaming("n.0$", "first"), WeightRenaming("n.2$", "last")], ["a.0.n.0", "a.1.n.0", "a.0.n.2"]),
    ],
)
def test_converters_give_the_values_of_transformers(transforms: list[Any], names: list[str]) -> None:
    tensors = numbered(names)
    expected = by_transformers(transforms, tensors)
    assert_same(by_rules(import_mapping(transforms, manifest_of(tensors)), tensors, expected), expected)


@pytest.mark.parametrize(
    ("transform", "names"),
    [
        (WeightConverter("q", "p", [PermuteForRope()]), ["a.q"]),
        (WeightConverter("q", "p", [Transpose(0, 1, check_dims=True)]), ["a.q"]),
        (WeightConverter("qkv", ["q", "k", "v", "x", "y"], [Chunk(0)]), ["a.qkv"]),
        (WeightConverter(["e.*.a", "e.*.b"], "e", [MergeModulelist(0), Concatenate(1)]), ["e.0.a", "e.1.a", "e.0.b"]),
        (WeightConverter(["e.*.a", "e.*.b"], "e", [MergeModulelist(0), Concatenate(0)]), ["e.0.a", "e.0.b"]),
        (WeightConverter("e.*.a", "e", [MergeModulelist(0), Transpose(1, 2)]), ["e.0.a", "e.1.a"]),
    ],
)
def test_converters_without_equivalent_are_refused_by_name(transform: WeightConverter, names: list[str]) -> None:
    (label,) = refusal([transform], names)
    assert transform.source_patterns[0] in label
    assert import_mapping([transform], shapes(["other.weight"])).rules[0].target == "other.weight"


def test_renamings_need_names() -> None:
    assert len(refusal([WeightRenaming("a", "b"), WeightRenaming("c", "d")])) == 2


# -- vLLM ----------------------------------------------------------------------------------------------------------


def mappers() -> list[Any]:
    """The mappers of some of vLLM's models."""
    found = []
    for model in MODELS:
        module = importlib.import_module(f"vllm.model_executor.models.{model}")
        for name, value in vars(module).items():
            mapper = getattr(value, "hf_to_vllm_mapper", None)
            if isinstance(mapper, WeightsMapper) and value.__module__ == module.__name__:
                found.append(pytest.param(mapper, id=f"{model}:{name}"))
    return found


def names_of(mapper: WeightsMapper) -> list[str]:
    """Names with each prefix, each inner text and each suffix of a mapper, in two layers."""
    prefixes = ["", *mapper.orig_to_new_prefix, "model."]
    inner = ["", *mapper.orig_to_new_substr, *mapper.orig_to_new_stacked]
    suffixes = ["weight", "bias", *mapper.orig_to_new_suffix]
    parts = [
        f"{prefix}layers.{layer}.{text.strip('.')}.{suffix.lstrip('.')}".replace("..", ".")
        for prefix in prefixes
        for text in inner
        for suffix in suffixes
        for layer in (0, 10)
    ]
    return list(dict.fromkeys(parts))


@pytest.mark.parametrize("mapper", mappers())
def test_mappers_of_vllm_models(mapper: WeightsMapper) -> None:
    names = names_of(mapper)
    rules = import_mapping(mapper, shapes(names))
    assert {name: mapped(rules, name) for name in names} == {name: by_vllm(mapper, name) for name in names}
    assert [target for name in names for target, _ in mapped(rules, name)] == mapper.apply_list(names)
    assert len(rules) < len(names)


WORDS = st.lists(st.sampled_from("a b q k 0 1 12 w".split()), min_size=1, max_size=4).map(".".join)
ENDS = st.one_of(st.none(), WORDS)


@settings(max_examples=300, deadline=None)
@given(
    st.dictionaries(WORDS, ENDS, max_size=2),
    st.dictionaries(WORDS, st.tuples(WORDS, st.sampled_from(["q", 0, 1])), max_size=2),
    st.dictionaries(WORDS, ENDS, max_size=3),
    st.dictionaries(WORDS, ENDS, max_size=1),
    st.lists(WORDS, min_size=1, max_size=12, unique=True),
)
def test_any_mapper_with_names(substr: Any, stacked: Any, prefix: Any, suffix: Any, names: list[str]) -> None:
    mapper = WeightsMapper(
        orig_to_new_regex={re.compile(r"a\.(\d+)"): r"\1.a"},
        orig_to_new_substr=substr,
        orig_to_new_stacked=stacked,
        orig_to_new_prefix=prefix,
        orig_to_new_suffix=suffix,
    )
    rules = import_mapping(mapper, shapes(names))
    assert {name: mapped(rules, name) for name in names} == {name: by_vllm(mapper, name) for name in names}


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(WORDS.map("{}.".format), ENDS, max_size=4), st.lists(WORDS, min_size=1, max_size=12))
def test_mappers_that_are_accepted_without_names_are_exact(prefix: Any, names: list[str]) -> None:
    mapper = WeightsMapper(orig_to_new_prefix=prefix, orig_to_new_regex={re.compile(r"^x\.(\d+)$"): r"{\1}.y"})
    try:
        rules = import_mapping(mapper)
    except RemapError as error:
        assert error.code == "remap_interop"
        assume(False)
    for name in [*names, *(key + "1" for key in prefix), "x.3", "x.3.w"]:
        assert mapped(rules, name) == by_vllm(mapper, name), name


def test_unanchored_or_overlapping_entries_need_names() -> None:
    mapper = WeightsMapper(
        orig_to_new_substr={".attn.": ".self_attn."},
        orig_to_new_suffix={".gamma": ".weight"},
        orig_to_new_prefix={"model.": "language_model.", "model.visual.": "visual.", "head.": "model.head."},
    )
    refused = refusal(mapper)
    assert {label.split("[")[0] for label in refused} == {
        f"orig_to_new_{kind}" for kind in ("substr", "suffix", "prefix")
    }
    assert len(refused) == 5
    assert len(import_mapping(mapper, shapes(["model.0.attn.gamma", "model.1.attn.gamma"]))) == 1


def test_one_tensor_for_several_shards_is_refused() -> None:
    mapper = WeightsMapper(orig_to_new_stacked={".qkvz": (".in_proj", (0, 1, 2)), ".q": (".qkv", "q")})
    assert list(refusal(mapper, ["l.0.qkvz.weight"])) == ["orig_to_new_stacked['.qkvz']"]


# -- SGLang --------------------------------------------------------------------------------------------------------

FLUX = {
    r"^transformer\.(\w*)\.(.*)$": r"\1.\2",
    r"^transformer_blocks\.(\d+)\.mlp_fc1\.(.*)$": r"transformer_blocks.\1.ff.net.0.proj.\2",
    r"^transformer_blocks\.(\d+)\.qkv_proj\.(.*)$": r"transformer_blocks.\1.attn.to_qkv.\2",
    r"^(.*)\.lora_down$": r"\1.proj_down",
}
MERGE = {
    r"(.*)\.to_q\.weight$": (r"\1.to_qkv.weight", 0, 3),
    r"(.*)\.to_k\.weight$": (r"\1.to_qkv.weight", 1, 3),
    r"(.*)\.to_v\.weight$": (r"\1.to_qkv.weight", 2, 3),
    r"^old\.(.*)$": r"\1",
    r"^unused\..*$": "",
    r"^(.*)\.up_gate\.(\w+)$": [r"\1.up.\2", r"\1.gate.\2"],
}


def test_dictionary_that_has_no_effect() -> None:
    true = conversion("sglang_flux")
    rules = import_mapping(FLUX, true.source)
    assert rules.compile(true.source, true.target).ok
    assert {name: mapped(rules, name) for name in true.source} == {
        entry["from"][0]: [(name, "")] for name, entry in true.map.items()
    }


def test_entries_of_a_dictionary_are_applied_in_turn() -> None:
    names = [
        "transformer.transformer_blocks.0.mlp_fc1.lora_down",
        "transformer.transformer_blocks.1.mlp_fc1.lora_down",
        "transformer_blocks.0.qkv_proj.weight",
    ]
    rules = import_mapping(FLUX, shapes(names))
    assert [mapped(rules, name)[0][0] for name in names] == [
        "transformer_blocks.0.ff.net.0.proj.proj_down",
        "transformer_blocks.1.ff.net.0.proj.proj_down",
        "transformer_blocks.0.attn.to_qkv.weight",
    ]
    assert len(rules) == 2


def test_a_dictionary_joins_splits_and_drops() -> None:
    names = [f"old.b.{layer}.to_{part}.weight" for layer in range(2) for part in "qkv"]
    tensors = numbered([*names, "unused.x", "b.0.up_gate.weight"])
    expected = {
        f"b.{n}.to_qkv.weight": torch.cat([tensors[f"old.b.{n}.to_{part}.weight"] for part in "qkv"]) for n in (0, 1)
    }
    up, gate = tensors["b.0.up_gate.weight"].chunk(2)
    expected |= {"b.0.up.weight": up, "b.0.gate.weight": gate}
    rules = import_mapping(MERGE, manifest_of(tensors))
    assert_same(by_rules(rules, tensors, expected), expected)
    assert len(rules) == 5


def test_tensors_without_equal_parts_are_copied_to_each() -> None:
    rules = import_mapping(
        MERGE, Manifest({"b.0.up_gate.scale": ((), "float32"), "b.1.up_gate.bias": ((3,), "float32")})
    )
    assert mapped(rules, "b.0.up_gate.scale") == [("b.0.up.scale", ""), ("b.0.gate.scale", "")]
    assert mapped(rules, "b.1.up_gate.bias") == [("b.1.up.bias", ""), ("b.1.gate.bias", "")]


def test_a_dictionary_without_names() -> None:
    rules = import_mapping({r"^a\.(\d+)\.(.*)$": r"x.\1.\2", r"^b\.": "y.", r"^c\..*$": ""})
    assert [mapped(rules, name) for name in ("a.3.w", "b.w", "c.w", "d.w")] == [
        [("x.3.w", "")],
        [("y.w", "")],
        [],
        [("d.w", "")],
    ]
    assert set(refusal(MERGE)) == set(MERGE) - {r"^unused\..*$"}
    assert list(refusal({r"^a\.": "b.", r"^b\.": "c."})) == [r"^a\."]


@pytest.mark.parametrize(
    ("mapping", "code"),
    [
        ({"a": 3}, "remap_interop"),
        ({"a": ("b", 3, 2)}, "remap_interop"),
        ({"a(": "b"}, "remap_rules"),
        (7, "remap_rules"),
        ([object()], "remap_rules"),
    ],
)
def test_values_that_are_not_mappings(mapping: object, code: str) -> None:
    with pytest.raises(RemapError) as caught:
        import_mapping(mapping)
    assert caught.value.code == code and caught.value.hint


class Config:
    """A configuration as SGLang's are: the dictionary is there once it is made."""

    def __init__(self) -> None:
        self.param_names_mapping = FLUX


def test_references() -> None:
    mixtral: Any = read_mapping("transformers:mixtral")
    entries = [item for key in ("mixtral", "legacy") for item in get_checkpoint_conversion_mapping(key)]
    assert [item.source_patterns for item in mixtral] == [item.source_patterns for item in entries]
    assert read_mapping(f"{__name__}:Config") == FLUX
    assert isinstance(
        read_mapping("vllm.model_executor.models.llama:LlamaForCausalLM.hf_to_vllm_mapper"), WeightsMapper
    )
    for reference in ("transformers:nothing", f"{__name__}:nothing", f"{__name__}:refusal", "no", "no_module:x"):
        with pytest.raises(RemapError) as caught:
            read_mapping(reference)
        assert caught.value.code == "remap_rules"


# -- export --------------------------------------------------------------------------------------------------------

RENAMES = (
    Rule(r"blocks\.(\d+)\.(?P<leaf>\w+)", r"layers.\1.x.\g<leaf>"),
    Rule(r"(head|tail)", r"out.\1"),
    Rule(r"{weird}(\.\d+)?", r"\{w\}\1"),
)
CHAINED = (Rule(r"a\.(.*)", r"b.\1"), Rule(r"b\.(.*)", r"a.\1"), Rule(r"(.*)", r"new.\1", fallback=True))
NAMES = ["blocks.3.w", "blocks.10.x.w", "head", "tail", "heads", "{weird}.1", "{weird}", "a.b.w", "b.a", "ab", "b."]


@pytest.mark.parametrize("rules", [RENAMES, CHAINED, RENAMES[:1]], ids=["renames", "chained", "one"])
@pytest.mark.parametrize("form", ["vllm", "transformers"])
def test_export_gives_the_same_names(rules: tuple[Rule, ...], form: str) -> None:
    made = RuleSet("made", rules)
    text, left_out = export_mapping(made, form)
    scope: dict[str, Any] = {}
    exec(text, scope)
    assert not left_out
    for name in NAMES:
        if form == "vllm":
            got = scope["MAPPER"].apply_list([name])
        else:
            (renamed,) = by_transformers(scope["MAPPING"], {name: torch.empty(0)})
            got = [renamed]
        known = [rule for rule in rules if re.fullmatch(rule.source, name)]
        expected = [target for target, _ in mapped(made, name)] if known else [name]
        assert got == expected


def test_rules_that_do_more_than_rename_are_named() -> None:
    more = (
        Rule("d", drop="not used"),
        Rule(target="k", keep="stays"),
        Rule("o", "o2", op="transpose"),
        Rule("i", "i2", into="[0:1]"),
        Rule("t", "t2", take="[0:1]"),
        Rule("s", "s2", shard="q"),
        Rule(r"c\.(\d+)", r"c.{\1 // 2}"),
    )
    rules = RuleSet("made", (*RENAMES, *more))
    for form in ("vllm", "transformers"):
        with pytest.raises(RemapError) as caught:
            export_mapping(rules, form)
        assert caught.value.code == "remap_interop"
        text, left_out = export_mapping(rules, form, partial=True)
        assert set(left_out) == {rule.label for rule in more} == set(caught.value.details["refused"])  # type: ignore[call-overload]
        assert all(f"# left out: {label}: " in text for label in left_out)


@pytest.mark.parametrize(
    "rule", [Rule(r"a\.(\d)", r"a\g<1>5"), Rule("a", "b$"), Rule("a.*.b", "c"), Rule(r"a\w*.b", "c")]
)
def test_rules_that_transformers_reads_differently_are_refused(rule: Rule) -> None:
    assert not export_mapping(RuleSet("made", (rule,)), "vllm")[1]
    with raises("remap_interop"):
        export_mapping(RuleSet("made", (rule,)), "transformers")


def test_a_library_is_not_imported_for_a_dictionary(tmp_path: Path) -> None:
    import subprocess
    import sys

    code = (
        "import sys; from port_kit.interop.imports import import_mapping; import_mapping({'^a': 'b'});"
        "assert not {'torch', 'transformers', 'vllm'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, timeout=300)
