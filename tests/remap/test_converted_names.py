"""Original and converted names: recorded in the file, or proved by the rules and the target."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from port_kit.errors import RemapError
from port_kit.manifest import NAMING_KEY, Manifest
from port_kit.remap import Op, Rule, RuleSet, load_local, load_weights
from port_kit.remap.export import checkpoint_reader, convert, convert_file, export_file
from port_kit.remap.invert import invert
from port_kit.remap.plan import check
from tests.remap.random_mappings import Shapes
from tests.remap.shapes import manifest_of, module_of, zeros

SWAP = RuleSet(
    "swap",
    (
        Rule(r"b\.(\d+)\.norm2", r"b.\1.norm3"),
        Rule(r"b\.(\d+)\.norm3", r"b.\1.norm2"),
        Rule(r"b\.(\d+)\.fused", r"b.\1.fused", op=Op.of("reorder", dim=0)),
        Rule("(.*)", r"\1", fallback=True),
    ),
)
SWAPPED = {f"b.{at}.{name}": (4,) for at in range(2) for name in ("norm1", "norm2", "norm3", "fused")}


def ways(tensors: dict[str, Tensor], folder: Path, rules: RuleSet, target: Shapes) -> Iterator[nn.Module]:
    for known in (folder, None):
        module = module_of(target)
        load_weights(module, tensors.items(), rules, folder=known)
        yield module
    module = module_of(target)
    load_local(module, folder, rules)
    yield module


def test_rules_are_applied_to_original_names_that_are_names_of_the_target(tmp_path: Path) -> None:
    tensors = {name: torch.randn(shape) for name, shape in SWAPPED.items()}
    save_file(tensors, tmp_path / "m.safetensors")
    for module in ways(tensors, tmp_path, SWAP, SWAPPED):
        assert torch.equal(module.get_parameter("b.1.norm3"), tensors["b.1.norm2"])
        assert torch.equal(module.get_parameter("b.1.fused"), tensors["b.1.fused"].roll(2))


def test_converted_files_record_it_and_are_not_converted_again(tmp_path: Path) -> None:
    original, converted, back = (tmp_path / name for name in ("original", "converted", "back"))
    original.mkdir()
    tensors = {name: torch.randn(shape) for name, shape in SWAPPED.items()}
    save_file(tensors, original / "m.safetensors")
    plan = SWAP.compile(Manifest.from_checkpoint(original), manifest_of(SWAPPED))
    convert_file(plan, checkpoint_reader(original, plan.source), converted / "m.safetensors")
    assert Manifest.from_checkpoint(original).naming == ""
    assert Manifest.from_checkpoint(converted).naming == "converted:swap"
    one, two, explicit = (module_of(SWAPPED) for _ in range(3))
    load_local(one, original, SWAP)
    load_local(two, converted, SWAP)
    load_weights(explicit, load_file(converted / "m.safetensors").items(), SWAP, converted=True)
    assert check(SWAP, Manifest.from_checkpoint(converted), manifest_of(SWAPPED)).converted
    for name, tensor in one.named_parameters():
        assert torch.equal(two.get_parameter(name), tensor) and torch.equal(explicit.get_parameter(name), tensor)
    inverse = invert(plan).compile(Manifest.from_checkpoint(converted), plan.source)  # not converted by these rules
    assert not inverse.converted
    restored = dict(convert(inverse, load_file(converted / "m.safetensors")))
    assert all(torch.equal(restored[name], tensor) for name, tensor in tensors.items())
    export_file(plan, two, back / "m.safetensors")
    assert Manifest.from_checkpoint(back).naming == "original"
    restored = load_file(back / "m.safetensors")
    assert all(torch.equal(restored[name], tensor) for name, tensor in tensors.items())


def test_a_record_that_is_wrong_for_the_target_is_an_error(tmp_path: Path) -> None:
    save_file({"p": torch.ones(2)}, tmp_path / "m.safetensors", metadata={NAMING_KEY: "converted"})
    rules = RuleSet("r", (Rule("p", "q"),))
    with pytest.raises(RemapError) as caught:
        load_local(module_of({"q": (2,)}), tmp_path, rules)
    assert caught.value.details["problems"][0]["source"] == "p"
    module = module_of({"q": (2,)})
    load_weights(module, [("p", torch.ones(2))], rules, folder=tmp_path, converted=False)
    assert module.q.tolist() == [1, 1]


def test_names_that_no_rule_matches_pass_if_all_are_names_of_the_target(tmp_path: Path) -> None:
    """Rules keep their meaning: a kept target may be absent, a missing one is an error."""
    rules = RuleSet("r", (Rule("p", "proj"), Rule("o", "out"), Rule(target="steps", keep="the module makes it")))
    target = {"proj": (3,), "out": (2,), "steps": (2,)}
    tensors = zeros({"proj": (3,), "out": (2,)})
    save_file(tensors, tmp_path / "m.safetensors")
    for module in ways(tensors, tmp_path, rules, target):
        assert module.proj.tolist() == [0, 0, 0]
    with pytest.raises(RemapError) as caught:
        load_weights(module_of(target), [("proj", torch.zeros(3))], rules)
    assert caught.value.code == "remap_missing"
    with pytest.raises(RemapError) as caught:
        load_weights(module_of(target), tensors.items(), rules, converted=False)
    assert {problem["code"] for problem in caught.value.details["problems"]} >= {"remap_unexpected"}


def test_rules_that_change_values_are_never_skipped_for_their_names(tmp_path: Path) -> None:
    """A mistyped pattern matches no name, and the names are equal on both sides."""
    rules = RuleSet("slip", (Rule(r"norm_ouT", "norm_out", op=Op.of("reorder", dim=0)),))
    tensors = zeros({"norm_out": (4,)})
    save_file(tensors, tmp_path / "m.safetensors")
    for folder in (tmp_path, None):
        with pytest.raises(RemapError) as caught:
            load_weights(module_of({"norm_out": (4,)}), tensors.items(), rules, folder=folder)
        codes = {problem["code"] for problem in caught.value.details["problems"]}
        assert codes >= {"remap_unexpected", "remap_dead_rule"}
    load_weights(module_of({"norm_out": (4,)}), tensors.items(), rules, converted=True)


def test_names_of_the_target_that_another_rule_set_converted_are_ambiguous(tmp_path: Path) -> None:
    """They may be converted for this module, or be sources of these rules."""
    tensors = zeros(SWAPPED)
    save_file(tensors, tmp_path / "m.safetensors", metadata={NAMING_KEY: "converted:swap_of_last_year"})
    with pytest.raises(RemapError) as caught:
        load_local(module_of(SWAPPED), tmp_path, SWAP)
    assert caught.value.code == "remap_mixed"
    for converted in (True, False):
        load_weights(module_of(SWAPPED), tensors.items(), SWAP, folder=tmp_path, converted=converted)
    renaming = RuleSet("port", (Rule(r"b\.(\d+)\.(\w+)", r"blocks.\1.\2"),))
    load_local(module_of({f"blocks{name[1:]}": shape for name, shape in SWAPPED.items()}), tmp_path, renaming)


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("forgotten", ["pos_embed", "layers.7.weight"])
def test_a_forgotten_rule_is_told_as_such(order: int, forgotten: str) -> None:
    """One tensor has a name of the target and no rule; all others are renamed."""
    rules = RuleSet("r", (Rule(r"blocks\.(\d+)\.(weight|bias)", r"layers.\1.\2"),))
    source = {forgotten: (3,), "blocks.0.weight": (2, 2), "blocks.0.bias": (2,)}
    target = {forgotten: (3,), "layers.0.weight": (2, 2), "layers.0.bias": (2,)}
    with pytest.raises(RemapError) as caught:
        load_weights(module_of(target), list(zeros(source).items())[::order], rules)
    found = {(problem["code"], problem.get("source", "")) for problem in caught.value.details["problems"]}
    assert ("remap_unexpected", forgotten) in found and not any("blocks.0" in source for _, source in found)
