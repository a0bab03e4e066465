"""Skip-layer guidance with the options of vLLM-Omni; ``test_skip_layers_protocol.py`` has the interface itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from vllm_omni.inputs.data import OmniDiffusionSamplingParams

from port_kit.models.ovi.config import TAGS, CheckpointOptions, parse_request
from port_kit.models.wan.pipeline.request import LatentLengths
from port_kit.models.wan.transformer.config import TRANSFORMER_CONFIG
from port_kit.models.wan.transformer.model import build_transformer
from port_kit.pipeline.skip_layers import SkipLayers
from port_kit.runtime.single_process import single_rank
from tests.helpers import raises

TINY = {"num_layers": 3, "dim": 48, "num_heads": 4, "ffn_dim": 64, "text_dim": 16}
MODEL = CheckpointOptions(video_area=720 * 720, audio_prompt=TAGS, skip_block=11, blocks=30)


def parse(**options: Any) -> SkipLayers:
    """Return the skip-layer guidance of a request with these options."""
    sampling = OmniDiffusionSamplingParams(extra_args=options)
    return parse_request("a street", sampling, LatentLengths(31, 157), MODEL).skip_layers


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, SkipLayers((11,))),
        ({"uncond_skip_layers": [12, 0, 12]}, SkipLayers((0, 12))),
        ({"uncond_skip_layers": " 9, 10"}, SkipLayers((9, 10))),
        ({"uncond_skip_layers": ""}, SkipLayers(())),
        ({"uncond_skip_layers": [], "slg_layer": 0}, SkipLayers(())),
        ({"uncond_skip_layers": [7], "slg_layer": 7}, SkipLayers((7,))),
        ({"slg_start": 0.1, "slg_stop": 0.6}, SkipLayers((11,), 0.1, 0.6)),
        ({"slg_start_percent": 0.1, "slg_end_percent": 1}, SkipLayers((11,), 0.1, 1.0)),
    ],
)
def test_options_of_vllm_omni_are_accepted(options: dict[str, Any], expected: SkipLayers) -> None:
    assert parse(**options) == expected


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        ({"uncond_skip_layers": [30]}, "input_value", ["uncond_skip_layers is 30", "0 to 29"]),
        ({"uncond_skip_layers": "3,x"}, "input_type", ["uncond_skip_layers is 'x'"]),
        ({"uncond_skip_layers": 3}, "input_type", ["uncond_skip_layers is int"]),
        ({"uncond_skip_layers": [1], "slg_layer": 2}, "input_value", ["slg_layer is 2", "[1]"]),
        ({"slg_start": 0.7, "slg_stop": 0.2}, "input_value", ["slg_start is 0.7"]),
        ({"slg_stop": 1.5}, "input_value", ["slg_stop is 1.5"]),
        ({"slg_start": 0.5, "slg_start_percent": 0.4}, "input_value", ["slg_start is 0.5", "0.4"]),
    ],
)
def test_no_option_is_ignored(options: dict[str, Any], code: str, words: list[str]) -> None:
    with raises(code, *words):
        parse(**options)


def test_the_window_is_a_fraction_of_the_steps() -> None:
    skip = SkipLayers((3,), 0.25, 0.75)
    assert [skip.at(step, 4) for step in range(4)] == [(), (3,), (3,), ()]
    assert [SkipLayers((3,)).at(step, 2) for step in range(2)] == [(3,), (3,)]


@torch.inference_mode()
def test_omitted_layers_are_those_of_a_transformer_without_them() -> None:
    with single_rank(torch.float32):
        towers = {name: {**TRANSFORMER_CONFIG[name], **TINY} for name in ("video", "audio")}
        model = build_transformer({**TRANSFORMER_CONFIG, **towers})
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            parameter.normal_(std=0.05, generator=generator)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        channels, width = model.config.video.in_channels, model.config.video.text_dim
        inputs = {"video": draw(1, channels, 2, 4, 4), "audio": draw(1, 5, model.config.audio.in_channels)}
        inputs |= {"timestep": torch.tensor(500), "video_text": draw(1, 3, width), "audio_text": draw(1, 3, width)}
        complete, skipped = model(**inputs), model(**inputs, skip_layers=(0, 2))
        del model.blocks[2], model.blocks[0]
        expected = model(**inputs)
    for found, wanted, other in zip(skipped, expected, complete, strict=True):
        assert found.equal(wanted) and not found.equal(other)
