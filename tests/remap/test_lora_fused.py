"""LoRA of projections that loading rearranges: vLLM-Omni's manager makes vLLM's layers act as the original."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from vllm.lora.request import LoRARequest
from vllm.model_executor.layers.linear import LinearBase
from vllm_omni.diffusion.lora.manager import DiffusionLoRAManager

from port_kit.errors import InputError, RemapError
from port_kit.manifest import Manifest
from port_kit.remap import Op, Rule, RuleSet, load_weights
from port_kit.remap.lora import remap_lora
from port_kit.runtime.lora import read_adapter
from port_kit.runtime.single_process import single_rank

WIDTH, HEAD, HEADS, FFN, OUT, RANK = 32, 8, 4, 24, 12, 3
GROUPED = Op.of("rearrange", pattern="(g r d) i -> (r g d) i", sizes=[["r", 4], ["d", HEAD]])
RULES = RuleSet(
    "split",
    (
        # slots in another order than theirs
        Rule(r"b\.vqk\.(weight)", (r"qkv.\1",) * 3, shard=("v", "q", "k"), op=Op.of("split", dim=0)),
        # a swapped gate, and a module beside it, from one linear
        Rule(
            r"b\.linear1\.weight",
            ("gate_up.weight", "gate_up.weight", "alone.weight"),
            shard=("1", "0", ""),
            op=Op.of("split", dim=0),
        ),
        # rows by head in another order
        Rule(r"b\.grouped\.weight", "grouped.weight", op=GROUPED),
        # parts by take, and one that is not used
        Rule(r"b\.taken\.weight", "taken.weight", take="[12:24, :]"),
        Rule(r"b\.taken\.weight", drop="of another head", take="[0:12, :]"),
        # by columns
        Rule(r"b\.wide\.weight", ("left.weight", "right.weight"), op=Op.of("split", dim=1, sizes=(20, 12))),
        Rule(r"b\.plain\.weight", "plain.weight"),
    ),
)
SHAPES = {
    "b.vqk": (3 * HEADS * HEAD, WIDTH),
    "b.linear1": (2 * FFN + OUT, WIDTH),
    "b.grouped": (64, WIDTH),
    "b.taken": (24, WIDTH),
    "b.wide": (OUT, WIDTH),
    "b.plain": (OUT, WIDTH),
}


class Transformer(nn.Module):
    """One of each kind of linear; gives all their results."""

    packed_modules_mapping: ClassVar = {"qkv": ["q", "k", "v"], "gate_up": ["gate", "up"]}
    stacked_params_mapping: ClassVar = [
        (".qkv", ".q", "q"),
        (".qkv", ".k", "k"),
        (".qkv", ".v", "v"),
        (".gate_up", ".gate", 0),
        (".gate_up", ".up", 1),
    ]

    def __init__(self) -> None:
        super().__init__()

        from port_kit.parallel.linear import column, qkv, row
        from port_kit.parallel.linear import merged as merged_linear

        self.qkv = qkv(WIDTH, HEAD, HEADS, None, "qkv", bias=False)
        self.gate_up = merged_linear(WIDTH, [FFN, FFN], None, "gate_up", bias=False)
        self.alone = column(WIDTH, OUT, None, "alone", bias=False)
        self.grouped = column(WIDTH, 64, None, "grouped", bias=False)
        self.taken = column(WIDTH, 12, None, "taken", bias=False)
        self.left, self.right = row(20, OUT, None, "left", bias=False), row(12, OUT, None, "right", bias=False)
        self.plain = column(WIDTH, OUT, None, "plain", bias=False)

    def forward(self, x: Tensor) -> Tensor:
        whole = [layer(x) for layer in (self.qkv, self.gate_up, self.alone, self.grouped, self.taken, self.plain)]
        found = [*whole, self.left(x[:, :20]), self.right(x[:, 20:])]
        return torch.cat([one[0] if isinstance(one, tuple) else one for one in found], -1)


class Pipeline(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.transformer = Transformer()

    def _load_diffusion_lora_adapter(self, *, lora_request: Any, lora_path: str, dtype: torch.dtype) -> Any:
        return read_adapter(lora_path, self.transformer, RULES, adapter=lora_request.lora_int_id, dtype=dtype)


@pytest.fixture(scope="module")
def alone() -> Iterator[None]:
    with single_rank(torch.float32):
        yield


def adapters(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for module, (rows, columns) in SHAPES.items():
        found[f"diffusion_model.{module}.lora_A.weight"] = torch.randn(RANK, columns, generator=generator)
        found[f"diffusion_model.{module}.lora_B.weight"] = torch.randn(rows, RANK, generator=generator)
        found[f"diffusion_model.{module}.alpha"] = torch.tensor(6.0)
    return found


def merged(base: dict[str, Tensor], lora: dict[str, Tensor]) -> dict[str, Tensor]:
    def delta(module: str) -> Tensor:
        parts = [lora[f"diffusion_model.{module}.lora_{side}.weight"] for side in "BA"]
        return 6.0 / RANK * parts[0] @ parts[1]

    return {name: tensor + delta(name.removesuffix(".weight")) for name, tensor in base.items()}


@pytest.mark.usefixtures("alone")
@torch.inference_mode()
def test_split_adapters_act_as_on_the_original(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    base = {f"{module}.weight": torch.randn(shape, generator=generator) for module, shape in SHAPES.items()}
    x = torch.randn(5, WIDTH, generator=generator)
    pipeline, wanted = Pipeline(), Transformer()
    load_weights(pipeline.transformer, base.items(), RULES)
    before = pipeline.transformer(x).clone()
    manager = DiffusionLoRAManager(pipeline, torch.device("cpu"), torch.float32)
    for number in (1, 2):  # the second is read when the first has wrapped the layers
        lora = adapters(number)
        save_file(lora, tmp_path / f"{number}.safetensors")
        manager.set_active_adapter(LoRARequest(str(number), number, str(tmp_path / f"{number}.safetensors")))
        load_weights(wanted, merged(base, lora).items(), RULES)
        expected, got = wanted(x), pipeline.transformer(x)
        assert (expected - before).abs().max() > 1
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-3)
    manager.set_active_adapter(None)
    assert torch.equal(pipeline.transformer(x), before)


@pytest.mark.usefixtures("alone")
def test_parts_share_what_is_not_split() -> None:
    found = remap_lora(
        adapters(1),
        RULES,
        target=Manifest.from_module(Transformer()),
        parts=Transformer.packed_modules_mapping,
    )
    given = adapters(1)
    assert {name.split(".")[0] for name in found} == {
        *("q", "k", "v", "gate", "up", "alone", "grouped", "taken", "left", "right", "plain")
    }
    a, b = (given[f"diffusion_model.b.vqk.lora_{side}.weight"] for side in "AB")
    assert all(torch.equal(found[f"{part}.lora_A.weight"], a) for part in "qkv")
    assert torch.equal(torch.cat([found[f"{part}.lora_B.weight"] for part in "vqk"]), b)
    a, b = (given[f"diffusion_model.b.wide.lora_{side}.weight"] for side in "AB")
    assert torch.equal(torch.cat([found["left.lora_A.weight"], found["right.lora_A.weight"]], 1), a)
    assert torch.equal(found["left.lora_B.weight"], b) and torch.equal(found["right.lora_B.weight"], b)
    assert found["up.alpha"] == 6.0
    unnamed = remap_lora(adapters(1), RULES, target=Manifest.from_module(Transformer()))
    assert {"q.alpha", "gate_up_0.alpha", "gate_up_1.alpha"} <= set(unnamed)


@pytest.mark.usefixtures("alone")
def test_shapes_are_those_of_the_linears_whatever_quantization_keeps(tmp_path: Path) -> None:
    transformer = Transformer()
    for layer in transformer.modules():
        if isinstance(layer, LinearBase):
            layer.weight = nn.Parameter(layer.weight.t().to(torch.float8_e4m3fn), requires_grad=False)
    save_file(adapters(1), tmp_path / "lora.safetensors")
    model, _ = read_adapter(tmp_path / "lora.safetensors", transformer, RULES, adapter=1, dtype=torch.float32)
    assert {name: tuple(lora.lora_b.shape) for name, lora in model.loras.items()} == {
        **{f"transformer.{part}": (HEADS * HEAD, RANK) for part in "qkv"},
        **{f"transformer.{part}": (FFN, RANK) for part in ("gate", "up")},
        **{f"transformer.{part}": (OUT, RANK) for part in ("alone", "taken", "left", "right", "plain")},
        "transformer.grouped": (64, RANK),
    }


@pytest.mark.usefixtures("alone")
def test_one_file_is_one_adapter(tmp_path: Path) -> None:
    pair = {f"b.plain.lora_{half}": adapters(1)[f"diffusion_model.b.plain.lora_{half}.weight"] for half in "AB"}
    file = {f"{name}.{label}.weight": tensor.clone() for name, tensor in pair.items() for label in ("default", "other")}
    save_file(file, tmp_path / "lora.safetensors")
    with pytest.raises(InputError) as caught:
        read_adapter(tmp_path / "lora.safetensors", Transformer(), RULES, adapter=1, dtype=torch.float32)
    assert caught.value.code == "lora_file"


TURNED = RuleSet("turned", (Rule(r"b\.w\.weight", "w.weight", op="transpose"),))
BOTH = RuleSet(
    "both", (Rule(r"b\.w\.weight", "w.weight", op=Op.of("rearrange", pattern="(a b) c -> (a c) b", sizes=[["b", 4]])),)
)
PART = RuleSet(
    "part",
    (Rule(r"b\.(w|z)\.weight", "w.weight", shard=r"\1", op=Op.of("concat", dim=0, parts=("w", "z"))),),
)
STACK = RuleSet("stack", (Rule(r"b\.w\.weight", "w.weight", shard="1", op=Op.of("stack", dim=0)),))
INTO = RuleSet("into", (Rule(r"b\.w\.weight", "w.weight", into="[0:4, :]"),))


@pytest.mark.parametrize(
    ("rules", "shape"),
    [(TURNED, (4, 4)), (BOTH, (4, 4)), (PART, (8, 4)), (STACK, (2, 4, 4)), (INTO, (8, 4))],
    ids=lambda v: str(v)[:20],
)
def test_what_cannot_follow_is_refused(rules: RuleSet, shape: tuple) -> None:
    target = Manifest({"w.weight": (shape, "float32")})
    lora = {"b.w.lora_A.weight": torch.zeros(2, 4), "b.w.lora_B.weight": torch.zeros(4, 2)}
    with pytest.raises(RemapError) as caught:
        remap_lora(lora, rules, target=target)
    assert caught.value.code == "remap_op"
