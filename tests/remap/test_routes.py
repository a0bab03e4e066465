"""Layers that are like an earlier one take its way; whatever makes a layer different is not missed for that."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from port_kit.errors import RemapError
from port_kit.manifest import Manifest
from port_kit.remap import Op, Rule, RuleSet, load_weights
from port_kit.remap.export import convert
from port_kit.remap.load import WeightLoader
from port_kit.remap.lower import Lowering
from port_kit.remap.routes import Routes, index_of
from port_kit.remap.targets import read_targets
from tests.remap.shapes import manifest_of, module_of
from tests.remap.worlds import Shapes

JOIN = Op.of("concat", dim=0, parts=("a", "b", "c"))
SIZED = Op.of("concat", dim=0, parts=("a", "b", "c"), sizes=("part", "part", "part"))


def filled(rules: RuleSet, source: Shapes, target: Shapes, folder: Path | None = None) -> dict[str, torch.Tensor]:
    """What a load leaves; it is what the plan, which knows no routes, makes of the same tensors."""
    tensors = {name: torch.randn(shape) for name, shape in source.items()}
    if folder is not None:
        save_file(tensors, folder / "model.safetensors")
    module = module_of(target)
    loaded = load_weights(module, tensors.items(), rules, folder=folder)
    expected = dict(convert(rules.compile(manifest_of(source), manifest_of(target)), tensors))
    assert loaded == set(target)
    for name, tensor in expected.items():
        assert torch.equal(module.get_parameter(name), tensor), name
    return expected


def layers(names: Sequence[str], shape: tuple[int, ...], count: int = 4) -> Shapes:
    return {f"b.{layer}.{name}": shape for layer in range(count) for name in names}


def test_every_layer_gets_its_own_numbers(tmp_path: Path) -> None:
    rules = RuleSet(
        "all",
        (
            Rule(r"b\.(\d+)\.(a|b|c)", r"x.\1.abc", shard=r"\2", op=JOIN),
            Rule(r"b\.(\d+)\.turned", r"x.\1.deep.turned", op="transpose"),
            Rule(r"b\.(\d+)\.e\.(\d+)\.w", r"x.\1.experts", shard=r"\2", op=Op.of("stack", dim=0)),
            Rule(r"b\.(\d+)\.late", r"x.{3 - \1}.late"),
            Rule(r"(n\.\d+\.w)", r"\1"),
        ),
    )
    source = layers(["a", "b", "c"], (2, 3)) | layers(["turned"], (2, 5)) | layers(["late"], (7,))
    source |= layers(["e.0.w", "e.1.w"], (4, 2)) | {f"n.{at}.w": (3,) for at in range(4)}
    target = {f"x.{at}.{name}": shape for at in range(4) for name, shape in TARGET.items()}
    filled(rules, source, target | {f"n.{at}.w": (3,) for at in range(4)}, tmp_path)


TARGET = {"abc": (6, 3), "deep.turned": (5, 2), "experts": (2, 4, 2), "late": (7,)}


def test_parts_of_other_widths_stand_elsewhere_in_another_layer(tmp_path: Path) -> None:
    """b is alike in both layers; where it stands depends on a, which the headers tell before it comes."""
    source = {"b.0.b": (3, 2), "b.1.b": (3, 2), "b.0.a": (1, 2), "b.1.a": (4, 2), "b.0.c": (5, 2), "b.1.c": (2, 2)}
    rules = RuleSet("widths", (Rule(r"b\.(\d+)\.(a|b|c)", r"x.\1", shard=r"\2", op=JOIN),))
    filled(rules, source, {"x.0": (9, 2), "x.1": (9, 2)}, tmp_path)
    filled(rules, source, {"x.0": (9, 2), "x.1": (9, 2)})


def test_a_last_layer_of_another_shape(tmp_path: Path) -> None:
    rules = RuleSet("last", (Rule(r"b\.(\d+)\.w", (r"x.\1.p", r"x.\1.q"), op=Op.of("split", dim=0)), ROWS))
    source = {"b.0.w": (6, 2), "b.1.w": (6, 2), "b.2.w": (4, 2), "b.0.r": (3, 2), "b.1.r": (3, 2), "b.2.r": (5, 2)}
    target = {f"x.{at}.{part}": ((4, 2) if at == 2 else (6, 2)) for at in range(3) for part in "pq"}
    target = {name: (shape[0] // 2, 2) for name, shape in target.items()}
    target |= {"x.0.r": (3, 2), "x.1.r": (3, 2), "x.2.r": (5, 2)}
    filled(rules, source, target)


ROWS = Rule(r"b\.(\d+)\.r", r"x.\1.r")


def test_a_number_that_a_pattern_spells_out_is_no_layer() -> None:
    rules = RuleSet("spelled", (Rule(r"b\.1\.r", r"first.r", op="transpose"), Rule(r"b\.([02-9])\.r", r"x.\1.r")))
    filled(rules, layers(["r"], (2, 3)), {"x.0.r": (2, 3), "first.r": (3, 2), "x.2.r": (2, 3), "x.3.r": (2, 3)})


def test_a_layer_that_the_target_lacks_is_named() -> None:
    source, module = layers(["r"], (2,), 4), module_of({f"x.{at}.r": (2,) for at in range(3)})
    with pytest.raises(RemapError, match=r"b\.3\.r is sent to x\.3\.r") as caught:
        load_weights(module, [(name, torch.zeros(shape)) for name, shape in source.items()], RuleSet("few", (ROWS,)))
    assert caught.value.code == "remap_beyond_layers"


@pytest.mark.parametrize(("shape", "dtype", "code"), [((3,), "float32", "remap_shape"), ((2,), "int64", "remap_dtype")])
def test_a_tensor_unlike_those_of_other_layers_is_refused(shape: tuple, dtype: str, code: str) -> None:
    tensors = {name: torch.zeros(2) for name in layers(["r"], (2,), 3)}
    tensors["b.2.r"] = torch.zeros(shape, dtype=getattr(torch, dtype))
    with pytest.raises(RemapError) as caught:
        load_weights(module_of({f"x.{at}.r": (2,) for at in range(3)}), tensors.items(), RuleSet("unlike", (ROWS,)))
    assert caught.value.code == code and "b.2.r" in str(caught.value)


def test_a_tensor_that_comes_twice_is_refused_in_every_layer() -> None:
    names = ["b.0.r", "b.1.r", "b.2.r"]
    for at in range(1, 4):
        for again in names[:at]:
            given = [(name, torch.zeros(2)) for name in (*names[:at], again, *names[at:])]
            with pytest.raises(RemapError, match=rf"{again} comes twice") as caught:
                load_weights(module_of({f"x.{layer}.r": (2,) for layer in range(3)}), given, RuleSet("twice", (ROWS,)))
            assert caught.value.code == "remap_collision"


def test_a_tensor_that_comes_twice_is_refused_after_others_of_another_dtype() -> None:
    given = [(f"b.{layer}.r", torch.zeros(2, dtype=torch.float16 if layer > 1 else None)) for layer in (0, 1, 2, 3, 1)]
    with pytest.raises(RemapError, match=r"b\.1\.r comes twice"):
        load_weights(module_of({f"x.{layer}.r": (2,) for layer in range(4)}), given, RuleSet("twice", (ROWS,)))


def test_a_layer_that_another_rule_speaks_of() -> None:
    """It is square, so that only its values tell that it was turned."""
    rules = RuleSet("turned", (Rule(r"b\.2\.r", r"x.2.r", op="transpose"), Rule(r"b\.([013-9])\.r", r"x.\1.r")))
    filled(rules, layers(["r"], (3, 3)), {f"x.{at}.r": (3, 3) for at in range(4)})


def test_a_layer_that_two_rules_speak_of_is_ambiguous() -> None:
    rules = RuleSet("both", (ROWS, Rule(r"b\.2\.r", r"x.2.r", op="transpose")))
    given = {name: torch.zeros(shape) for name, shape in layers(["r"], (3, 3)).items()}
    with pytest.raises(RemapError, match=r"b\.2\.r matches 2 rules"):
        load_weights(module_of({f"x.{at}.r": (3, 3) for at in range(4)}), given.items(), rules)


@pytest.mark.parametrize("shape", [(5, 2), (2,), (4, 3, 2)])
def test_a_target_unlike_those_of_other_layers_takes_no_like_tensor(shape: tuple[int, ...]) -> None:
    given = {name: torch.zeros(shape) for name, shape in layers(["r"], (3, 2), 3).items()}
    with pytest.raises(RemapError) as caught:
        load_weights(
            module_of({"x.0.r": (3, 2), "x.1.r": (3, 2), "x.2.r": shape}), given.items(), RuleSet("u", (ROWS,))
        )
    assert caught.value.code == "remap_shape" and "b.2.r" in str(caught.value)


PARTS = RuleSet("parts", (Rule(r"b\.(\d+)\.(a|b|c)", r"x.\1", shard=r"\2", op=SIZED),), {"part": 2})


@pytest.mark.parametrize("missing", ["b.0.a", "b.1.b", "b.3.c"])
def test_a_part_that_one_layer_lacks_is_named(missing: str) -> None:
    given = {name: torch.ones(shape) for name, shape in layers(["a", "b", "c"], (2, 3)).items() if name != missing}
    with pytest.raises(RemapError) as caught:
        load_weights(module_of({f"x.{at}": (6, 3) for at in range(4)}), given.items(), PARTS)
    assert caught.value.code == "remap_incomplete_group"
    assert [problem["target"] for problem in caught.value.details["problems"]] == [f"x.{missing[2]}"]


@pytest.mark.parametrize("order", [1, -1])
def test_parts_that_one_layer_is_blamed_for_are_missed_in_another(order: int) -> None:
    """A part of a wrong dtype explains what its own layer lacks, and nothing that a like one lacks."""
    given = {name: torch.ones(shape) for name, shape in layers(["a", "b", "c"], (2, 3)).items() if name != "b.2.a"}
    given["b.1.a"] = torch.ones(2, 3, dtype=torch.int64)
    names = sorted(given)[::order]
    with pytest.raises(RemapError) as caught:
        load_weights(module_of({f"x.{at}": (6, 3) for at in range(4)}), [(name, given[name]) for name in names], PARTS)
    found = {problem["target"]: problem["code"] for problem in caught.value.details["problems"]}
    assert found == {"x.1": "remap_dtype", "x.2": "remap_incomplete_group"}


def test_a_part_of_another_dtype_is_loaded_all_the_same() -> None:
    given = {name: torch.randn(shape) for name, shape in layers(["a", "b", "c"], (2, 3)).items()}
    given["b.2.b"] = given["b.2.b"].half()
    module = module_of({f"x.{at}": (6, 3) for at in range(4)})
    assert len(load_weights(module, given.items(), PARTS)) == 4
    for at in range(4):
        assert torch.equal(module.get_parameter(f"x.{at}"), torch.cat([given[f"b.{at}.{part}"] for part in "abc"]))


def test_a_part_of_another_dtype_does_not_stand_for_that_of_another_layer() -> None:
    given = {name: torch.ones(shape) for name, shape in layers(["a", "b", "c"], (2, 3)).items() if name != "b.3.b"}
    given["b.1.b"] = given["b.1.b"].half()
    with pytest.raises(RemapError, match=r"x\.3") as caught:
        load_weights(module_of({f"x.{at}": (6, 3) for at in range(4)}), given.items(), PARTS)
    assert caught.value.code == "remap_incomplete_group"


def test_a_module_that_is_moved_during_a_load_gets_its_values() -> None:
    """Seats hold parameters, not their memory."""
    module = module_of({f"x.{at}": (6, 3) for at in range(4)})
    given = {name: torch.randn(shape) for name, shape in layers(["a", "b", "c"], (2, 3)).items()}
    loader = WeightLoader(module, PARTS)
    for number, (name, tensor) in enumerate(given.items()):
        if number == 6:
            for parameter in module.parameters():
                parameter.data = parameter.data.clone()
        loader.feed(name, tensor)
    assert len(loader.finish()) == 4
    for at in range(4):
        assert torch.equal(module.get_parameter(f"x.{at}"), torch.cat([given[f"b.{at}.{part}"] for part in "abc"]))


def routes_of(rules: RuleSet, source: Shapes, target: Shapes) -> tuple[Routes, torch.nn.Module]:
    """The routes after the first source has gone its way."""
    module, name = module_of(target), next(iter(source))
    lowering, targets = Lowering(rules, dict(Manifest.from_module(module)), {}), read_targets(module).targets
    routes = Routes(lowering, targets, lambda target, write, tensor: pytest.fail("there is no loader"))
    assert not routes.learn(name, ())
    write = lowering.lower(name, manifest_of(source)[name]).writes[0]
    routes.show(torch.ones(source[name]), targets[write.target], write, lowering.matches(name)[0])
    return routes, module


def test_seats_are_kept_where_a_layer_shows_the_way() -> None:
    """The tests above would hold without seats; this one would not."""
    routes, module = routes_of(RuleSet("few", (ROWS,)), {"b.0.r": (2,)}, {f"x.{at}.r": (2,) for at in range(4)})
    assert not routes.learn("b.2.other", ()) and not routes.learn("r", ()) and not routes.seats
    assert routes.learn("b.2.r", ["b.0.r", "b.3.r"]) and not routes.learn("b.2.r", ())
    assert set(routes.seats) == {"b.1.r", "b.2.r"}
    seat = routes.seats["b.2.r"]
    assert seat is not None and seat[0] == "b.2.r" and seat[1].name == "x.2.r"
    seat[2].put(seat[1], torch.ones(2))
    assert torch.equal(module.get_parameter("x.2.r"), torch.ones(2))


@pytest.mark.parametrize(
    ("pattern", "first", "seats"),
    [
        (r"b\.(\d+)\.(ffn\.[02]\.w)", "b.0.ffn.0.w", {"b.0.ffn.0.w", "b.1.ffn.0.w", "b.2.ffn.0.w"}),
        (r"b\.([0-2])\.(ffn\.0\.w)", "b.0.ffn.0.w", set()),
        (r"b\.([13]|2|\d\d+)\.(ffn\.0\.w)", "b.1.ffn.0.w", {"b.1.ffn.0.w", "b.2.ffn.0.w"}),
        (r"b\.(\d\d?|\d+)\.(ffn\.0\.w)", "b.0.ffn.0.w", {"b.0.ffn.0.w", "b.1.ffn.0.w", "b.2.ffn.0.w"}),
    ],
)
def test_numbers_that_patterns_spell_out_get_the_seats_that_their_rule_gives(
    pattern: str, first: str, seats: set[str]
) -> None:
    rules = RuleSet("spelled", (Rule(pattern, r"x.\1.\2"),))
    routes, _ = routes_of(rules, {first: (2,)}, {f"x.{at}.ffn.0.w": (2,) for at in range(3)})
    routes.learn("b.7.ffn.0.w", ())
    assert set(routes.seats) == seats


@pytest.mark.parametrize("box", [((0, 4), (0, 6)), ((1, 3), (0, 6)), ((0, 4), (2, 5)), ((1, 2), (3, 6))])
def test_an_index_is_the_view_of_its_box(box: tuple) -> None:
    tensor = torch.arange(24).reshape(4, 6)
    index = index_of(box, (4, 6))
    view = tensor if index is None else tensor[index]
    assert torch.equal(view, tensor[tuple(slice(*span) for span in box)])
    assert view.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
    assert (index is None) == (box == ((0, 4), (0, 6))) and isinstance(index, slice) == (box == ((1, 3), (0, 6)))
