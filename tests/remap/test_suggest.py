"""Suggestions: correct for known conversions, and uncertain if names and shapes prove no mapping."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from port_kit.manifest import Manifest
from port_kit.remap import RuleSet
from port_kit.remap.plan import check
from port_kit.remap.suggest import Suggestion, suggest
from port_kit.remap.suggest.assignment import best_assignment
from port_kit.remap.suggest.index_expressions import index_expressions
from port_kit.remap.suggest.module_groups import group_modules, has_own_order
from port_kit.remap.suggest.vocabulary import words
from port_kit.reports.plan_json import plan_map
from tests.remap.conversions import FAMILIES, conversion


def as_given(manifest: Manifest) -> Manifest:
    return manifest


def as_sorted(manifest: Manifest) -> Manifest:
    return Manifest(dict(sorted(manifest.items())))


def as_shuffled(manifest: Manifest) -> Manifest:
    items = list(manifest.items())
    random.Random(7).shuffle(items)
    return Manifest(dict(items))


def shapes(**entries: list[int]) -> Manifest:
    return Manifest.from_json({name.replace("__", "."): shape for name, shape in entries.items()})


def proposed(suggestion: Suggestion, source: Manifest, target: Manifest) -> dict[str, dict[str, Any]]:
    """Return the mapping of the proposed rules, from their plan."""
    return plan_map(check(suggestion.rules, source, target))


def wrong(found: Mapping[str, Any], truth: Mapping[str, Any]) -> list[str]:
    return [name for name, entry in found.items() if entry != truth.get(name)]


@pytest.mark.parametrize("order", [as_given, as_sorted, as_shuffled])
@pytest.mark.parametrize("family", FAMILIES)
def test_suggestion_is_the_true_conversion(family: str, order: Callable[[Manifest], Manifest]) -> None:
    truth = conversion(family)
    source, target = order(truth.source), order(truth.target)
    suggestion = suggest(source, target)
    plan = check(suggestion.rules, source, target)
    assert plan.ok, [str(problem) for problem in plan.problems]
    assert wrong(plan_map(plan), truth.map) == []
    assert set(plan.dropped) == set(truth.dropped)


@pytest.mark.parametrize("family", FAMILIES)
def test_certain_rules_alone_are_right(family: str) -> None:
    truth = conversion(family)
    certain = suggest(truth.source, truth.target).only("certain")
    assert wrong(plan_map(check(certain, truth.source, truth.target)), truth.map) == []


def test_matches_forced_by_shapes_are_certain() -> None:
    """The only vector of the model's width outside of the layers, whatever it is called."""
    truth = conversion("litgpt_llama")
    certain = [item for item in suggest(truth.source, truth.target).proposals if item.confidence == "certain"]
    assert [(item.sources, item.targets) for item in certain] == [
        (("model.norm.weight",), ("transformer.ln_f.weight",))
    ]


def test_each_rule_states_its_matches() -> None:
    truth = conversion("litgpt_llama")
    suggestion = suggest(truth.source, truth.target, "litgpt_llama")
    explained = [name for proposal in suggestion.proposals for name in proposal.targets]
    assert sorted(explained) == sorted(truth.target)
    assert RuleSet.from_toml(suggestion.to_toml()) == suggestion.rules
    assert {rule.confidence for rule in suggestion.rules} == {"certain", "likely"}
    assert all(rule.note for rule in suggestion.rules)
    assert sum(suggestion.explained().values()) == len(truth.target)
    assert {"name", "proposals", "missing", "tied", "scales", "targets_explained"} == set(suggestion.to_json())
    assert all(bool(proposal.doubts) == (proposal.confidence == "likely") for proposal in suggestion.proposals)


def test_changes_that_shapes_cannot_show_are_not_certain() -> None:
    truth = conversion("sd3")
    doubted = {
        name: proposal.doubts
        for proposal in suggest(truth.source, truth.target).proposals
        for name in proposal.targets
        if proposal.confidence == "likely"
    }
    assert "halves change places" in " ".join(doubted["norm_out.linear.weight"])
    assert "interleaved" in " ".join(doubted["transformer_blocks.0.attn.to_q.weight"])
    assert set(name for name, entry in truth.map.items() if entry["op"] != "copy") <= set(doubted)


def test_another_component_in_the_file_is_dropped_as_one() -> None:
    flux, vae = conversion("flux1"), conversion("sd_vae")
    source = Manifest({**flux.source, **vae.source})
    suggestion = suggest(source, flux.target)
    plan = check(suggestion.rules, source, flux.target)
    assert plan.ok and wrong(plan_map(plan), flux.map) == []
    assert [rule.source for rule in suggestion.rules if rule.drop] == [r"first_stage_model\..+"]


def test_renamed_query_and_key_may_be_permuted() -> None:
    source = shapes(layers__0__wq__weight=[8, 8], layers__0__wo__weight=[8, 4])
    target = shapes(layers__0__q_proj__weight=[8, 8], layers__0__o_proj__weight=[8, 4])
    found = {proposal.targets[0]: proposal for proposal in suggest(source, target).proposals}
    assert found["layers.0.q_proj.weight"].confidence == "likely"
    assert "rotary" in " ".join(found["layers.0.q_proj.weight"].doubts)


def test_a_name_on_both_sides_outweighs_the_order() -> None:
    """The norms of an attention and of its layer, registered in any order."""
    names = ("attention.q_norm", "attention.k_norm", "attention_norm")

    def side(norms: tuple[str, ...]) -> Manifest:
        return shapes(**{f"layers.{n}.{norm}.weight": [8] for n in range(2) for norm in norms})

    source = side(names)
    for order in itertools.permutations(names):
        target = side(order)
        found = proposed(suggest(source, target), source, target)
        assert {name: entry["from"] for name, entry in found.items()} == {name: [name] for name in target}


def test_equal_unrelated_tensors_are_left_out_and_reported() -> None:
    source = shapes(foo__weight=[4, 4], bar__weight=[4, 4], txt_in__weight=[8, 4])
    target = shapes(quux__weight=[4, 4], zork__weight=[4, 4], context_embedder__weight=[8, 4])
    suggestion = suggest(source, target)
    assert set(suggestion.missing) == {"quux.weight", "zork.weight"}
    assert set(suggestion.missing["zork.weight"]) == {"foo.weight", "bar.weight"}
    assert "not explained: zork.weight" in suggestion.to_text()
    assert set(proposed(suggestion, source, target)) == {"context_embedder.weight"}


def test_a_target_without_any_source_is_reported() -> None:
    suggestion = suggest(shapes(a__weight=[4, 4]), shapes(a__weight=[4, 4], b__weight=[3, 9]))
    assert suggestion.missing == {"b.weight": ()}
    assert "no unused source has its size" in suggestion.to_text()


def test_unused_sources_are_dropped_only_when_nothing_is_missing() -> None:
    source = shapes(a__q__weight=[4, 4], vae__conv__weight=[3, 3])
    complete = suggest(source, shapes(a__q__weight=[4, 4]))
    assert [rule.drop != "" for rule in complete.rules] == [False, True]
    assert complete.proposals[-1].confidence == "likely"
    gap = suggest(source, shapes(a__q__weight=[4, 4], b__weight=[5, 7]))
    assert not any(rule.drop for rule in gap.rules)


def test_parametrized_weights_keep_their_long_names() -> None:
    leaves = {"bias": [4], "parametrizations.weight.original0": [4, 1], "parametrizations.weight.original1": [4, 3]}
    source = Manifest.from_json({f"pos_conv.0.{leaf}": shape for leaf, shape in leaves.items()})
    target = Manifest.from_json({f"pos_conv.conv.{leaf}": shape for leaf, shape in leaves.items()})
    found = proposed(suggest(source, target), source, target)
    assert {name: entry["from"] for name, entry in found.items()} == {
        f"pos_conv.conv.{leaf}": [f"pos_conv.0.{leaf}"] for leaf in leaves
    }


def test_sides_of_different_dtypes_give_rules_that_may_round() -> None:
    source, target = Manifest({"a.q.weight": ([4, 4], "float32")}), Manifest({"b.q.weight": ([4, 4], "bfloat16")})
    assert suggest(source, target).rules.allow_downcast
    assert check(suggest(source, target).rules, source, target).ok
    assert not suggest(source, source).rules.allow_downcast


def test_stacked_experts_both_ways() -> None:
    apart = {f"layers.{layer}.experts.{at}.w2.weight": [4, 6] for layer in range(2) for at in range(3)}
    stacked = {f"layers.{layer}.experts.w2.weight": [3, 4, 6] for layer in range(2)}
    one, other = Manifest.from_json(apart), Manifest.from_json(stacked)
    assert {entry["op"] for entry in proposed(suggest(one, other), one, other).values()} == {"stack"}
    back = proposed(suggest(other, one), other, one)
    assert back["layers.1.experts.2.w2.weight"]["detail"] == {"dim": 0, "start": 2, "stop": 3, "reshape": [4, 6]}


def test_transposed_linears_take_square_ones_along() -> None:
    source = shapes(h__0__fc__weight=[4, 8], h__0__fc__bias=[8], h__0__proj__weight=[4, 4], h__0__proj__bias=[4])
    target = shapes(h__0__fc__weight=[8, 4], h__0__fc__bias=[8], h__0__proj__weight=[4, 4], h__0__proj__bias=[4])
    found = proposed(suggest(source, target), source, target)
    assert {name: entry["op"] for name, entry in found.items()} == {
        "h.0.fc.weight": "transpose",
        "h.0.fc.bias": "copy",
        "h.0.proj.weight": "transpose",
        "h.0.proj.bias": "copy",
    }


@pytest.mark.parametrize("family", ["litgpt_llama", "wan_t2v", "z_image"])
def test_a_prefix_has_no_effect(family: str) -> None:
    truth = conversion(family)
    source = truth.source.under("model.inner.")
    found = proposed(suggest(source, truth.target), source, truth.target)
    names = {name: [origin.removeprefix("model.inner.") for origin in entry["from"]] for name, entry in found.items()}
    assert names == {name: entry["from"] for name, entry in truth.map.items()}


@pytest.mark.parametrize("family", ["flux1", "hf_mixtral"])
def test_the_same_manifest_maps_onto_itself(family: str) -> None:
    target = conversion(family).target
    found = proposed(suggest(target, target), target, target)
    assert all(entry["op"] == "copy" and entry["from"] == [name] for name, entry in found.items())


def confidences(suggestion: Suggestion) -> dict[str, str]:
    return {name: item.confidence for item in suggestion.proposals for name in item.targets}


def test_equal_names_do_not_make_rows_certain() -> None:
    """Between two code bases q and k may be rotated otherwise, a fused projection interleaved, halves swapped."""
    source = shapes(
        model__layers__0__self_attn__q_proj__weight=[8, 8],
        model__layers__0__self_attn__qkv_proj__weight=[24, 8],
        model__layers__0__mlp__gate_up_proj__weight=[32, 8],
        model__layers__0__input_layernorm__weight=[8],
        model__norm__weight=[8],
    )
    target = shapes(
        layers__0__attn__q_proj__weight=[8, 8],
        layers__0__attn__qkv_proj__weight=[24, 8],
        layers__0__mlp__gate_up_proj__weight=[32, 8],
        layers__0__sa_norm__scale=[8],
        norm__scale=[8],
    )
    found = confidences(suggest(source, target))
    assert {found[name] for name in target if "proj" in name} == {"likely"}
    same = confidences(suggest(source, source.under("model.inner.")))
    assert {found for name, found in same.items() if not name.endswith("model.norm.weight")} == {"likely"}


def test_kernels_are_turned_and_square_ones_never_certain() -> None:
    source = shapes(layer__0__q__kernel=[6, 6], layer__0__wi__kernel=[6, 9], tok__embedding=[12, 6])
    target = shapes(layer__0__q__weight=[6, 6], layer__0__wi__weight=[9, 6], tok__weight=[12, 6])
    suggestion = suggest(source, target)
    ops = {name: entry["op"] for name, entry in proposed(suggestion, source, target).items()}
    assert ops == {"layer.0.q.weight": "transpose", "layer.0.wi.weight": "transpose", "tok.weight": "copy"}
    assert confidences(suggestion)["layer.0.q.weight"] == "likely"


def test_levels_that_may_count_backwards_are_not_certain() -> None:
    def levels(*names: str) -> Manifest:
        shape = {name: [6, 6, 3, 3] for name in names} | {
            f"{name.split('.')[0]}.conv_in.weight": [6, 4] for name in names
        }
        return Manifest.from_json(shape)

    source = levels(*(f"decoder.up.{n}.block.{at}.conv{c}.weight" for n in range(3) for at in range(2) for c in (1, 2)))
    target = levels(
        *(f"decoder.up_blocks.{n}.resnets.{at}.conv{c}.weight" for n in range(3) for at in range(2) for c in (1, 2))
    )
    found = confidences(suggest(source, target))
    assert found["decoder.up_blocks.0.resnets.0.conv1.weight"] == "likely"
    assert set(confidences(suggest(source, source.under("vae."))).values()) == {"likely"}


def test_gates_of_another_code_base_are_not_certain() -> None:
    source = shapes(h__0__mlp__w1__weight=[9, 4], h__0__mlp__w2__weight=[9, 4], h__0__mlp__c_proj__weight=[4, 9])
    target = shapes(
        l__0__mlp__gate_proj__weight=[9, 4], l__0__mlp__up_proj__weight=[9, 4], l__0__mlp__down__weight=[4, 9]
    )
    found = confidences(suggest(source, target))
    assert {found.get(f"l.0.mlp.{half}_proj.weight", "likely") for half in ("gate", "up")} == {"likely"}


def test_nothing_is_transposed_that_fits_upright() -> None:
    """Names pull w2 towards down and c_proj towards up, but both sides have as many matrices of each shape."""
    source = shapes(h__0__mlp__w1__weight=[9, 4], h__0__mlp__w2__weight=[9, 4], h__0__mlp__c_proj__weight=[4, 9])
    target = shapes(l__0__mlp__up__weight=[9, 4], l__0__mlp__gate__weight=[9, 4], l__0__mlp__down__weight=[4, 9])
    found = proposed(suggest(source, target), source, target)
    assert found["l.0.mlp.down.weight"]["from"] == ["h.0.mlp.c_proj.weight"]
    assert {entry["op"] for entry in found.values()} == {"copy"}


def test_latent_queries_and_keys_are_fused() -> None:
    attn = "layers.0.self_attn"
    parts = {f"{attn}.q_a_proj.weight": [6, 4], f"{attn}.kv_a_proj_with_mqa.weight": [5, 4]}
    source, target = Manifest.from_json(parts), Manifest.from_json({f"{attn}.fused_qkv_a_proj.weight": [11, 4]})
    found = proposed(suggest(source, target), source, target)
    assert found[f"{attn}.fused_qkv_a_proj.weight"]["from"] == list(parts)


def test_columns_are_joined_and_cut() -> None:
    parts = {f"h.{n}.attn.{part}.w": [6, 4] for n in range(2) for part in "qkv"}
    whole = {f"h.{n}.attn.qkv.w": [6, 12] for n in range(2)}
    apart, fused = Manifest.from_json(parts), Manifest.from_json(whole)
    joined = proposed(suggest(apart, fused), apart, fused)
    assert joined["h.1.attn.qkv.w"]["op"] == "concat" and joined["h.1.attn.qkv.w"]["detail"]["dim"] == 1
    cut = proposed(suggest(fused, apart), fused, apart)
    assert cut["h.0.attn.v.w"] == {
        "from": ["h.0.attn.qkv.w"],
        "op": "split",
        "detail": {"dim": 1, "start": 8, "stop": 12},
    }


@pytest.mark.parametrize("leaves", [("weight_g", "weight_v"), ("parametrizations.weight.original0",) * 2])
def test_weight_norms_are_folded_but_never_made(leaves: tuple[str, str]) -> None:
    magnitude, direction = leaves[0], leaves[1].replace("original0", "original1")
    convs = {"pre": [8, 3, 7], "ups.0": [8, 4, 4], "ups.1": [4, 2, 4]}
    normed = {f"g.{conv}.{direction}": shape for conv, shape in convs.items()}
    normed |= {f"g.{conv}.{magnitude}": [shape[0], 1, 1] for conv, shape in convs.items()}
    plain = {f"{conv}.weight": shape for conv, shape in convs.items()}
    for table in (normed, plain):
        table |= {f"{'g.' if table is normed else ''}{conv}.bias": [shape[0]] for conv, shape in convs.items()}
    source, target = Manifest.from_json(normed), Manifest.from_json(plain)
    suggestion = suggest(source, target)
    plan = check(suggestion.rules, source, target)
    assert plan.ok, [str(problem) for problem in plan.problems]
    found = plan_map(plan)
    assert set(found["ups.1.weight"]["from"]) == {f"g.ups.1.{magnitude}", f"g.ups.1.{direction}"}
    assert found["ups.1.weight"]["detail"] == {"ops": ["weight_norm"]}
    assert "ups.1.weight_v" not in proposed(suggest(target, source), target, source)


def test_a_tied_head_is_reported_and_never_kept_by_guess() -> None:
    source = shapes(model__embed_tokens__weight=[20, 4], model__norm__weight=[4])
    target = shapes(model__embed_tokens__weight=[20, 4], model__norm__weight=[4], lm_head__weight=[20, 4])
    suggestion = suggest(source, target)
    assert suggestion.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    assert "keep it if the module ties it to model.embed_tokens.weight" in suggestion.to_text()
    assert not any(rule.keep for rule in suggestion.rules) and not check(suggestion.rules, source, target).ok


# -- parts ----------------------------------------------------------------------------------------------------------


def test_words_of_different_code_bases_match() -> None:
    assert words("to_q") == words("query") == ("q",)
    assert set(words("img_attn_qkv")) == {"img", "attn", "q", "k", "v"}
    assert words("encoder_attn") == ("cross", "attn")
    assert words("adaLN_modulation") == ("modulation", "norm", "modulation")
    assert words("0") == ()


def test_units_keep_shards_and_abstract_layers() -> None:
    names = {
        f"blocks.{layer}.mlp.{slot}.{leaf}": (4,)
        for layer in range(3)
        for slot in (0, 2)
        for leaf in ("weight", "bias")
    }
    units = {str(unit): unit for unit in group_modules(names)}
    assert set(units) == {"blocks.{}.mlp.0", "blocks.{}.mlp.2"}
    assert units["blocks.{}.mlp.2"].instances == ((0,), (1,), (2,))
    assert units["blocks.{}.mlp.2"].roles == ("bias", "weight")
    assert len(group_modules(names, "tensors")) == len(names)


def test_a_sorted_or_scattered_file_has_no_order_of_its_own() -> None:
    names = ["z.0.weight", "z.0.bias", "a.0.weight", "a.0.bias", "m.weight"]
    assert has_own_order(dict.fromkeys(names, (1,)))
    assert not has_own_order(dict.fromkeys(sorted(names), (1,)))
    scattered = [f"{module}.{at}.weight" for at in range(6) for module in ("z", "a", "m")]
    assert not has_own_order(dict.fromkeys(scattered, (1,)))


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        ([((at,), (at,)) for at in range(3)], [r"\1"]),
        ([((at,), (at + 1,)) for at in range(3)], [r"{\1 - 1}"]),
        ([((3 - at,), (at,)) for at in range(4)], [r"{3 - \1}"]),
        ([((at // 4, at % 4), (at,)) for at in range(12)], [r"{\1 // 4}", r"{\1 % 4}"]),
        ([(((at - 1) // 3, (at - 1) % 3), (at,)) for at in range(1, 10)], [r"{(\1 - 1) // 3}", r"{(\1 - 1) % 3}"]),
        ([((0, at), (at,)) for at in range(3)], ["0", r"\1"]),
        ([((0,), (0,)), ((7,), (1,)), ((9,), (2,))], None),
    ],
)
def test_layer_numbers_as_expressions(pairs: list[Any], expected: list[str] | None) -> None:
    assert index_expressions(pairs, {0: 1}) == expected


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.data())
def test_assignment_is_the_best_there_is(rows: int, columns: int, data: st.DataObject) -> None:
    values = st.one_of(st.none(), st.integers(1, 30))
    scores = {
        (f"s{row}", f"t{column}"): float(value)
        for row in range(rows)
        for column in range(columns)
        if (value := data.draw(values)) is not None
    }
    found = best_assignment(scores)
    assert len(set(found.values())) == len(found)
    total = sum(scores[source, target] for target, source in found.items())
    assert total == best_by_trying(scores, rows, columns)


def best_by_trying(scores: Mapping[tuple[str, str], float], rows: int, columns: int) -> float:
    """Return the best sum over all assignments; impossible pairs count zero."""
    size = max(rows, columns)
    return max(
        sum(scores.get((f"s{row}", f"t{column}"), 0.0) for row, column in enumerate(order))
        for order in itertools.permutations(range(size))
    )


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(st.text("ab01._", min_size=1, max_size=9), st.lists(st.integers(0, 4), max_size=3), max_size=12))
def test_rules_for_arbitrary_names_are_exact(entries: dict[str, list[int]]) -> None:
    source = Manifest.from_json(entries)
    target = Manifest.from_json({f"x.{name}": shape for name, shape in entries.items()})
    suggestion = suggest(source, target)
    found = proposed(suggestion, source, target)
    explained = {name for proposal in suggestion.proposals for name in proposal.targets}
    assert explained == set(found)
    assert explained | set(suggestion.missing) == set(target)
