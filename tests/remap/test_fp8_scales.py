"""FP8 checkpoints in vLLM's own quantized linears: every scale in its slot, or one scale in all of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from port_kit.errors import RemapError
from port_kit.manifest import Manifest
from port_kit.remap import RuleSet, load_weights
from port_kit.remap.export import export
from port_kit.remap.local import load_local
from port_kit.runtime.single_process import single_rank
from tests.helpers import raises

WIDTH, HEAD, HEADS, KV_HEADS, FFN = 64, 16, 4, 2, 96
FP8 = torch.float8_e4m3fn
RULE_SETS = Path(__file__).parent / "rule_sets" / "fp8"
APART, FUSED = (RuleSet.from_file(RULE_SETS / f"{name}.toml") for name in ("apart", "fused"))
ROWS = {"q": HEADS * HEAD, "k": KV_HEADS * HEAD, "v": KV_HEADS * HEAD, "gate": FFN, "up": FFN, "o": WIDTH}
GROUP = {part: "mlp" if part in ("gate", "up", "gate_up") else "attn" for part in [*ROWS, "qkv", "gate_up"]}
SLOTS = {"q": ("qkv", "q"), "k": ("qkv", "k"), "v": ("qkv", "v"), "gate": ("gate_up", 0), "up": ("gate_up", 1)}


@pytest.fixture(scope="module")
def layers() -> Iterator[nn.ModuleDict]:
    """vLLM's fused linears under its FP8 method, as a serialized checkpoint asks for."""
    with single_rank(dtype=torch.bfloat16):
        from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
        from vllm.model_executor.layers.quantization.fp8 import Fp8Config

        config = Fp8Config(is_checkpoint_fp8_serialized=True, activation_scheme="static")
        plain = {"bias": False, "quant_config": config}
        attn = nn.ModuleDict(
            {
                "qkv": QKVParallelLinear(WIDTH, HEAD, HEADS, KV_HEADS, prefix="qkv", **plain),
                "o": RowParallelLinear(WIDTH, WIDTH, prefix="o", **plain),
            }
        )
        gate_up = MergedColumnParallelLinear(WIDTH, [FFN, FFN], prefix="gate_up", **plain)
        layer = nn.ModuleDict({"attn": attn, "mlp": nn.ModuleDict({"gate_up": gate_up})})
        yield nn.ModuleDict({"layers": nn.ModuleList([layer])})


def clear(module: nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.full(parameter.shape, float("nan")))


def apart(shape: tuple[int, ...]) -> dict[str, Tensor]:
    """A checkpoint with all projections apart, each with two scales of this shape."""
    tensors = {}
    for number, (part, rows) in enumerate(ROWS.items(), 1):
        tensors[f"blocks.0.{GROUP[part]}.{part}.weight"] = torch.randn(rows, WIDTH).to(FP8)
        tensors[f"blocks.0.{GROUP[part]}.{part}.weight_scale"] = torch.full(shape, number / 8)
        tensors[f"blocks.0.{GROUP[part]}.{part}.input_scale"] = torch.full(shape, number / 64)
    return tensors


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.data.clone().view(torch.uint8) for name, parameter in module.named_parameters()}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def by_own_loaders(module: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The result of vLLM's loaders for the projections, called directly."""
    clear(module)
    for name, tensor in tensors.items():
        *_, group, part, leaf = name.split(".")
        layer, slot = SLOTS.get(part, (part, None))
        parameter = module.get_parameter(f"layers.0.{group}.{layer}.{leaf}")
        parameter.weight_loader(parameter, tensor, *([] if slot is None else [slot]))
    return state(module)


@pytest.mark.parametrize("shape", [(), (1,)])
def test_scales_of_projections_go_to_their_slots(layers: nn.ModuleDict, tmp_path: Path, shape: tuple) -> None:
    tensors = apart(shape)
    expected = by_own_loaders(layers, tensors)
    clear(layers)
    names = load_weights(layers, list(tensors.items())[::-1], APART)
    assert names == set(expected)
    assert_same(state(layers), expected)
    assert layers.get_submodule("layers.0.attn.qkv").weight_scale.tolist() == [1 / 8, 2 / 8, 3 / 8]
    save_file(tensors, tmp_path / "model.safetensors")
    clear(layers)
    done = load_local(layers, tmp_path, APART)
    assert_same(state(layers), expected)
    assert done.loaded == names and not done.read_whole and done.bytes_read == done.bytes_whole
    plan = APART.compile(Manifest.from_checkpoint(tmp_path), Manifest.from_module(layers))
    for name, tensor in export(plan, layers):
        assert tensor.shape == tensors[name].shape
        assert torch.equal(tensor.float(), tensors[name].float()), name


@pytest.mark.parametrize("shape", [(), (1,)])
def test_one_scale_goes_to_every_slot(layers: nn.ModuleDict, tmp_path: Path, shape: tuple) -> None:
    tensors = {"blocks.0.attn.o.weight": torch.randn(WIDTH, WIDTH).to(FP8)}
    for number, (part, rows) in enumerate({"qkv": (HEADS + 2 * KV_HEADS) * HEAD, "gate_up": 2 * FFN}.items(), 1):
        tensors[f"blocks.0.{GROUP[part]}.{part}.weight"] = torch.randn(rows, WIDTH).to(FP8)
        tensors[f"blocks.0.{GROUP[part]}.{part}.weight_scale"] = torch.full(shape, number / 8)
        tensors[f"blocks.0.{GROUP[part]}.{part}.input_scale"] = torch.full(shape, number / 64)
    tensors["blocks.0.attn.o.weight_scale"] = tensors["blocks.0.attn.o.input_scale"] = torch.full(shape, 7.0)
    expected = by_own_loaders(layers, tensors)
    clear(layers)
    load_weights(layers, tensors.items(), FUSED)
    assert_same(state(layers), expected)
    assert layers.get_submodule("layers.0.attn.qkv").weight_scale.tolist() == [1 / 8] * 3
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    clear(layers)
    assert not load_local(layers, tmp_path, FUSED).read_whole
    assert_same(state(layers), expected)
    plan = FUSED.compile(Manifest.from_checkpoint(tmp_path), Manifest.from_module(layers))
    back = dict(export(plan, layers))
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name].float(), tensor.float()) for name, tensor in tensors.items())
    with torch.no_grad():
        layers.get_submodule("layers.0.attn.qkv").weight_scale[1] = 3.0  # trained on, or reduced to another value
    with raises("remap_op"):
        dict(export(plan, layers))


def test_a_projection_without_its_scale_is_named(layers: nn.ModuleDict) -> None:
    tensors = apart(())
    del tensors["blocks.0.attn.k.input_scale"]
    with raises("remap_incomplete_group", "k.input_scale"):
        load_weights(layers, tensors.items(), APART)


@pytest.mark.parametrize(("shape", "op"), [((3,), ""), ((2,), "fill"), ((1, 1), ""), ((0,), "fill")])
def test_a_scale_of_another_shape_is_refused(layers: nn.ModuleDict, shape: tuple, op: str) -> None:
    tensors = apart(())
    tensors["blocks.0.attn.q.weight_scale"] = torch.zeros(shape)
    rules = APART.override([replace(APART.rules[0], op=op)]) if op else APART
    with pytest.raises(RemapError) as caught:
        load_weights(layers, [(k, v) for k, v in tensors.items() if not op or "scale" in k], rules)
    assert "remap_shape" in {problem["code"] for problem in caught.value.details["problems"]}
