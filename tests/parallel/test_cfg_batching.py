"""Branches of a step in one call of the transformer: conditions, results, and saved communication."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from port_kit.models.wan.transformer.config import TRANSFORMER_CONFIG
from port_kit.models.wan.transformer.modality_io import TextContext
from port_kit.models.wan.transformer.model import build_transformer
from port_kit.parallel import cfg_batching
from port_kit.parallel.cfg_batching import BatchedCFGMixin, should_batch_branches
from port_kit.parallel.comm import cuda_stream_ops
from port_kit.parallel.layout import Layout
from port_kit.parallel.verify import ParallelTestCase, verify_layout
from port_kit.runtime.single_process import single_rank
from port_kit.testing.workers import RankResult

TINY = {"num_layers": 3, "dim": 48, "num_heads": 4, "ffn_dim": 64, "text_dim": 16}


def engine(
    *, hsdp: bool = False, offload: bool = False, cache: str | None = None, tokens: int = 1, heads: int = 1
) -> Any:
    """Return the attributes of an engine's configuration that are read."""
    parallel = SimpleNamespace(use_hsdp=hsdp, sequence_parallel_size=tokens, tensor_parallel_size=heads)
    return SimpleNamespace(parallel_config=parallel, enable_layerwise_offload=offload, cache_backend=cache)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (engine(), False),
        (engine(hsdp=True), True),
        (engine(offload=True, cache="none"), True),
        (engine(hsdp=True, cache="cache_dit"), False),
        (engine(offload=True, cache="tea_cache"), False),
    ],
    ids=["plain", "hsdp", "offload", "hsdp, cache", "offload, cache"],
)
def test_branches_are_batched_if_weights_are_streamed(config: Any, expected: bool) -> None:
    assert should_batch_branches(config) is expected


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (engine(), False),
        (engine(tokens=2), True),
        (engine(heads=2), True),
        (engine(tokens=2, cache="cache_dit"), False),
    ],
    ids=["plain", "sequence", "tensor", "sequence, cache"],
)
def test_branches_are_batched_if_gpus_share_them(config: Any, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not should_batch_branches(config)  # on a CPU no computation overlaps with waiting
    monkeypatch.setattr(cfg_batching, "current_platform", SimpleNamespace(is_cuda=lambda: True))
    monkeypatch.setattr(cuda_stream_ops, "is_installed", lambda: False)
    assert not should_batch_branches(config)  # nor if NCCL transfers all data
    monkeypatch.setattr(cuda_stream_ops, "is_installed", lambda: True)
    assert should_batch_branches(config) is expected
    monkeypatch.setenv("PORT_KIT_DISABLE_SYMM_MEM", "1")
    assert not should_batch_branches(config)


@torch.inference_mode()
def test_together_is_one_after_the_other() -> None:
    """Bit by bit: unequal sizes, a skipped layer, unused streams, and a text that two branches share."""
    towers = {name: {**TRANSFORMER_CONFIG[name], **TINY} for name in ("video", "audio")}
    with single_rank(torch.float32):
        model = build_transformer({**TRANSFORMER_CONFIG, **towers})
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            parameter.normal_(std=0.2, generator=generator)
        channels = model.config.video.in_channels, model.config.audio.in_channels

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        shared = draw(1, 5, 16)

        def branches() -> list[dict[str, Any]]:
            text = TextContext(shared)
            first = {"video": clip, "audio": audio, "timestep": torch.tensor([900]), "video_text": text}
            short = {"video": clip[:, :, :2], "audio": audio[:, :4], "timestep": torch.tensor([30])}
            return [
                {**first, "audio_text": text},
                {**first, "audio_text": other, "skip_layers": (1,)},
                {**first, "audio_text": text, "unused": "audio"},
                {**short, "video_text": other, "audio_text": other, "unused": "video"},
            ]

        clip, audio, other = draw(1, channels[0], 3, 4, 4), draw(1, 9, channels[1]), draw(1, 3, 16)
        alone = [model(**one) for one in branches()]
        first, *others = branches()
        together = model(**first, extra_branches=others)
    assert len(together) == len(alone)
    for mine, expected in zip(together, alone, strict=True):
        assert all(a.equal(b) for a, b in zip(mine, expected, strict=True))
    assert alone[0][0].abs().max() > 0


def test_hsdp_gathers_each_block_once_a_step(
    subject: ParallelTestCase, single: RankResult, transformer_model: Path
) -> None:
    blocks = json.loads((transformer_model / "transformer/config.json").read_text())["video"]["num_layers"]
    report = verify_layout(subject, Layout.parse("hsdp2"), single)
    assert report.ok, report.findings
    steps = len(subject.requests)
    assert report.collectives["_allgather_base"][0] == steps * (blocks + 1)  # and the weights outside of blocks


class Pipeline(BatchedCFGMixin):
    """Predictor that records its branches; each returns its own number."""

    def __init__(self, config: Any) -> None:
        self.od_config = config
        self.calls: list[list[int]] = []

    def transformer(self, number: int, extra_branches: Any = None) -> Any:  # type: ignore[override]
        """Give each pass's number, as flows are given."""
        numbers = [number, *(other["number"] for other in extra_branches or ())]
        self.calls.append(numbers)
        flows = [(torch.tensor(float(one)), torch.tensor(-float(one))) for one in numbers]
        return flows[0] if extra_branches is None else flows

    def combine_multi_branch_cfg_noise(self, predictions: Any, scale: Any, cfg_normalize: bool = False) -> Any:
        """Give them all."""
        return predictions


@pytest.mark.parametrize(
    ("config", "guided", "calls"),
    [
        (engine(hsdp=True), True, [[0, 1, 2]]),
        (engine(hsdp=True), False, [[0]]),
        (engine(), True, [[0], [1], [2]]),
    ],
    ids=["together", "unguided", "one by one"],
)
def test_the_mixin_keeps_order(config: Any, guided: bool, calls: list[list[int]]) -> None:
    pipeline = Pipeline(config)
    flows = pipeline.predict_noise_with_multi_branch_cfg(guided, 1.0, [{"number": i} for i in range(3)])
    assert pipeline.calls == calls
    if guided:
        assert [flow[0].item() for flow in flows] == [0.0, 1.0, 2.0]
