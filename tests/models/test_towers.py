"""Towers alone and pairs of unequal towers on one rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel

from port_kit.manifest import Manifest
from port_kit.models.wan.transformer.config import FusionConfig, RopeConfig, TowerConfig
from port_kit.models.wan.transformer.modality_io import TextContext
from port_kit.models.wan.transformer.model import WanFusionTransformer, build_transformer
from port_kit.models.wan.transformer.rope import RopeTables
from port_kit.models.wan.transformer.tower import WanTower
from port_kit.models.wan.weights.transformer_rules import AUDIO_TOWER, TRANSFORMER, VIDEO_TOWER
from port_kit.remap import RuleSet, load_weights
from port_kit.runtime.single_process import single_rank
from port_kit.testing.rules import assert_covers, uncaught_mutations
from tests.helpers import raises
from tests.models.unequal_towers import AUDIO, FUSION, VIDEO, fusion_checkpoint, tower_checkpoint, tower_tensors

#: What both full-size towers share.
FULL = {"text_dim": 4096, "text_len": 512, "freq_dim": 256}
WAN_T2V = Path(__file__).parents[1] / "remap" / "rule_sets" / "wan_t2v.toml"


def build_tower(values: dict[str, Any], rules: RuleSet) -> WanTower:
    tower = WanTower(TowerConfig.from_dict(values, "tower"))
    load_weights(tower, tower_checkpoint(values).items(), rules)
    return tower


def test_a_video_tower_alone_is_diffusers_wan() -> None:
    """The same checkpoint in both, through two rule sets; 36 tokens, 16 of 20 channels come back."""
    original = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=VIDEO["num_heads"],
        attention_head_dim=VIDEO["dim"] // VIDEO["num_heads"],
        in_channels=VIDEO["in_dim"],
        out_channels=VIDEO["out_dim"],
        text_dim=VIDEO["text_dim"],
        freq_dim=VIDEO["freq_dim"],
        ffn_dim=VIDEO["ffn_dim"],
        num_layers=VIDEO["num_layers"],
    )
    load_weights(original, tower_checkpoint(VIDEO).items(), RuleSet.from_toml(WAN_T2V))
    video, text, time = torch.randn(1, 20, 3, 6, 8), torch.randn(1, 12, 24), torch.tensor([812.0])
    with single_rank(torch.float32), torch.inference_mode():
        flow = build_tower(VIDEO, VIDEO_TOWER)(video, time, text)
    with torch.inference_mode():
        expected = original(video, time, text, return_dict=False)[0]
    assert flow.shape == (1, 16, 3, 6, 8)
    torch.testing.assert_close(flow, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("sizes", "rules", "count"),
    [
        (
            {**VIDEO, **FULL, "dim": 5120, "num_heads": 40, "num_layers": 40, "ffn_dim": 13824, "in_dim": 36},
            VIDEO_TOWER,
            (1095, 14_288_901_184),
        ),
        (
            {
                **AUDIO,
                **FULL,
                "dim": 1536,
                "num_heads": 12,
                "num_layers": 30,
                "ffn_dim": 8960,
                "in_dim": 128,
                "out_dim": 128,
            },
            AUDIO_TOWER,
            (825, 1_419_193_472),
        ),
    ],
    ids=["video", "audio"],
)
def test_full_size_towers_have_a_place_for_every_tensor(
    sizes: dict[str, Any], rules: RuleSet, count: tuple[int, int]
) -> None:
    """The numbers of tensors and parameters are those of MOVA's video and audio tower."""
    source = Manifest.from_json({name: [list(shape), dtype] for name, (shape, dtype) in tower_tensors(sizes).items()})
    with single_rank(torch.bfloat16), torch.device("meta"):
        tower = WanTower(TowerConfig.from_dict(sizes, "tower"))
    assert_covers(rules, source, Manifest.from_module(tower), allow_downcast=True)
    assert (len(source), sum(parameter.numel() for parameter in tower.parameters())) == count


@pytest.mark.parametrize(("values", "rules"), [(VIDEO, VIDEO_TOWER), (AUDIO, AUDIO_TOWER)], ids=["video", "audio"])
def test_a_damaged_tower_is_noticed(values: dict[str, Any], rules: RuleSet) -> None:
    shapes = tower_tensors(values | {"num_layers": 2})
    source = Manifest.from_json({name: [list(shape), "float32"] for name, (shape, _) in shapes.items()})
    with single_rank(torch.float32), torch.device("meta"):
        target = Manifest.from_module(WanTower(TowerConfig.from_dict(values | {"num_layers": 2}, "tower")))
    assert uncaught_mutations(assert_covers(rules, source, target)) == []


def test_an_audio_tower_alone_runs_and_keeps_its_text() -> None:
    with single_rank(torch.float32), torch.inference_mode():
        tower = build_tower(AUDIO, AUDIO_TOWER)
        audio, text = torch.randn(2, 9, 10), TextContext(torch.randn(2, 7, 24))
        flow = tower(audio, torch.tensor(300), text)
        again = tower(audio, torch.tensor(300), text)
        other = tower(audio.flip(1), torch.tensor(300), text)
    assert flow.shape == audio.shape and flow.isfinite().all()
    assert torch.equal(flow, again) and len(text.keys_values) == AUDIO["num_layers"]
    assert not torch.allclose(flow, other.flip(1), atol=1e-3), "positions have no effect"


def test_audio_of_a_plain_tower_rotates_complete_heads() -> None:
    """Angle of pair i at position p: p / 10000^(i / 6) for heads of 12."""
    table = RopeTables(RopeConfig(), 12).table((5,))
    angles = torch.outer(torch.arange(5).double(), 10000.0 ** -(torch.arange(6).double() / 6))
    torch.testing.assert_close(table[0], torch.stack((angles.cos(), angles.sin()), -1).float(), rtol=0, atol=1e-7)


@pytest.mark.parametrize("unused", [None, "video", "audio"])
def test_an_unequal_pair_is_loaded_and_reads_both_towers(unused: str | None) -> None:
    with single_rank(torch.float32), torch.inference_mode():
        model = build_transformer(FUSION)
        load_weights(model, fusion_checkpoint(FUSION).items(), TRANSFORMER)
        projections = [model.blocks[0].get_submodule(f"{stream}.cross_attn.kv_fusion") for stream in ("video", "audio")]
        assert [tuple(layer.weight.shape) for layer in projections] == [(192, 48), (96, 96)]
        video, audio, texts = torch.randn(1, 48, 2, 4, 4), torch.randn(1, 5, 20), torch.randn(2, 1, 6, 24)
        flows = model(video, audio, torch.tensor(700), *texts, unused=unused)
        changed = model(video, audio + 1, torch.tensor(700), *texts, unused=unused)
    assert [flow.shape for flow in flows] == [video.shape, audio.shape]
    for stream, flow, other in zip(("video", "audio"), flows, changed, strict=True):
        assert torch.equal(flow, other) == (stream == unused), f"{stream} does not depend on the audio"


@pytest.mark.parametrize(("dim", "heads", "layers"), [(32, 2, 1), (96, 4, 2), (256, 2, 1)])
def test_equal_widths_run(dim: int, heads: int, layers: int) -> None:
    sizes = {"dim": dim, "num_heads": heads, "num_layers": layers, "ffn_dim": 2 * dim}
    towers = {stream: FUSION[stream] | sizes for stream in ("video", "audio")}
    with single_rank(torch.float32), torch.inference_mode():
        model = WanFusionTransformer(FusionConfig.from_dict(FUSION | towers))
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        video, audio = torch.randn(1, 48, 2, 2, 4), torch.randn(1, 3, 20)
        flows = model(video, audio, torch.tensor([5]), torch.randn(1, 8, 24), torch.randn(1, 1, 24))
    assert [flow.shape for flow in flows] == [video.shape, audio.shape]
    assert all(flow.isfinite().all() for flow in flows)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"num_layers": 3}, ("num_layers", "2", "3")),
        ({"num_heads": 2}, ("head_dim", "12", "24")),
        ({"eps": 1e-5}, ("eps", "1e-06", "1e-05")),
        ({"out_dim": 16}, ("audio.out_dim", "16", "20")),
        ({"patch_size": [1, 2, 2]}, ("conv_kernel", "video")),
    ],
)
def test_a_pair_that_cannot_be_fused_is_refused(change: dict[str, Any], names: tuple[str, ...]) -> None:
    with raises("config_invalid", *names):
        build_transformer(FUSION | {"audio": FUSION["audio"] | change})


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"num_heads": 7}, ("96", "7")),
        ({"patch_size": [2]}, ("patch_size", "(2,)")),
        ({"qk_norm": False}, ("tower.qk_norm", "False")),
    ],
)
def test_an_impossible_tower_is_refused(change: dict[str, Any], names: tuple[str, ...]) -> None:
    with raises("config_invalid", *names):
        TowerConfig.from_dict(VIDEO | change, "tower")
