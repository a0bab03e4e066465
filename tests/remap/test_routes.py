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
from port_kit.remap.lower import Lowering
from port_kit.remap.routes import Place, Routes
from port_kit.remap.targets import read_targets
from tests.remap.shapes import manifest_of, module_of
from tests.remap.worlds import Shapes

JOIN = Op.of("concat", dim=0, parts=("a", "b", "c"))


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


def test_a_tensor_that_comes_twice_is_refused() -> None:
    given = [(name, torch.zeros(2)) for name in ("b.0.r", "b.1.r", "b.2.r", "b.1.r")]
    with pytest.raises(RemapError, match=r"b\.1\.r comes twice"):
        load_weights(module_of({f"x.{at}.r": (2,) for at in range(3)}), given, RuleSet("twice", (ROWS,)))


def test_routes_are_found_where_a_layer_shows_them() -> None:
    """The tests above would hold without routes; this one would not."""
    source, module = manifest_of({"b.0.r": (2,)}), module_of({f"x.{at}.r": (2,) for at in range(3)})
    targets = read_targets(module).targets
    lowering = Lowering(RuleSet("few", (ROWS,)), dict(Manifest.from_module(module)), {})
    routes, tensor = Routes(lowering), torch.ones(2)
    assert routes.find("b.0.r") is None
    write = lowering.lower("b.0.r", source["b.0.r"]).writes[0]
    routes.learn("b.0.r", tensor, targets["x.0.r"], write, 0)
    route = routes.find("b.2.r")
    assert route is not None and (route.before, routes.number, route.after) == ("x.", "2", ".r")
    assert routes.find("b.2.other") is None and routes.find("c.2.r") is None and routes.find("r") is None
    route.put(targets["x.2.r"], tensor)
    assert torch.equal(module.get_parameter("x.2.r"), tensor)


@pytest.mark.parametrize("box", [((0, 4), (0, 6)), ((1, 3), (0, 6)), ((0, 4), (2, 5)), ((1, 2), (3, 6))])
def test_a_place_is_the_view_of_its_box(box: tuple) -> None:
    tensor = torch.arange(24).reshape(4, 6)
    view = Place.of(box, (4, 6)).view(tensor)
    assert torch.equal(view, tensor[tuple(slice(*span) for span in box)])
    assert view.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
