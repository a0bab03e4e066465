"""The transformer's rule set: complete on the published checkpoint, strict on damaged ones."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from port_kit.errors import RemapError
from port_kit.manifest import Manifest
from port_kit.models.wan.parity.transformer_cases import TransformerGolden, recorded_forwards
from port_kit.models.wan.transformer.config import TRANSFORMER_CONFIG
from port_kit.models.wan.transformer.model import WanFusionTransformer, build_transformer
from port_kit.models.wan.weights.transformer_rules import TRANSFORMER
from port_kit.remap import load_weights
from port_kit.runtime.single_process import single_rank
from port_kit.testing.tiny import expand
from port_kit.testing.tiny_fusion import outline

QUERY = "video_model.blocks.1.self_attn.q.weight"


@pytest.fixture(scope="module")
def case(goldens: Path) -> TransformerGolden:
    return recorded_forwards(goldens)["ovi_t2v"]


@pytest.fixture(scope="module")
def state(case: TransformerGolden) -> dict[str, Tensor]:
    return load_file(case.folder / case.meta["state"])


def load(case: TransformerGolden, state: dict[str, Tensor]) -> WanFusionTransformer:
    with single_rank(torch.float32):
        model = build_transformer(case.config)
        load_weights(model, state.items(), TRANSFORMER)
    return model


def test_every_published_tensor_has_its_place() -> None:
    tensors = expand(outline("wan_transformer"))
    source = Manifest.from_json({name: [list(shape), dtype] for name, (shape, dtype) in tensors.items()})
    assert len(source) == 2073
    started = time.process_time()
    with single_rank(torch.bfloat16), torch.device("meta"):
        target = Manifest.from_module(build_transformer(TRANSFORMER_CONFIG))
    plan = TRANSFORMER.compile(source, target)
    assert {task.source for task in plan.tasks} == set(source)
    assert {task.target for task in plan.tasks} == set(target)
    assert time.process_time() - started < 5


def test_projections_are_stored_as_they_are_read(case: TransformerGolden, state: dict[str, Tensor]) -> None:
    model = load(case, state)
    q, k, v = (state[f"audio_model.blocks.2.self_attn.{name}.bias"] for name in "qkv")
    assert torch.equal(model.blocks[2].audio.self_attn.qkv.bias, torch.cat((q, k, v)).float())
    k, v = (state[f"video_model.blocks.0.cross_attn.{name}_fusion.bias"] for name in "kv")
    assert torch.equal(model.blocks[0].video.cross_attn.kv_fusion.bias, torch.cat((k, v)).float())
    gate, up = (state[f"audio_model.patch_embedding.2.{name}.weight"].flatten(1) for name in ("w1", "w3"))
    assert torch.equal(model.audio.patch_embedding.gated.gate_up.weight, torch.cat((gate, up)).float())


def test_any_order_gives_the_same_weights(case: TransformerGolden, state: dict[str, Tensor]) -> None:
    forwards = load(case, state).state_dict()
    backwards = load(case, dict(reversed(state.items()))).state_dict()
    assert all(torch.equal(forwards[name], backwards[name]) for name in forwards)


@pytest.mark.parametrize("damage", ["missing", "renamed", "reshaped", "surplus"])
def test_a_damaged_checkpoint_is_refused_by_name(
    damage: str, case: TransformerGolden, state: dict[str, Tensor]
) -> None:
    damaged = dict(state)
    if damage == "missing":
        del damaged[QUERY]
    elif damage == "renamed":
        damaged[QUERY.replace(".q.", ".query.")] = damaged.pop(QUERY)
    elif damage == "reshaped":
        damaged[QUERY] = damaged[QUERY][:-1]
    else:
        damaged["video_model.blocks.1.self_attn.gate.weight"] = damaged[QUERY]
    with pytest.raises(RemapError) as caught:
        load(case, damaged)
    assert "blocks.1.self_attn" in str(caught.value)
