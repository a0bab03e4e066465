"""CUDA graphs of the blocks of the fusion transformer: flows equal bit for bit while texts and shapes change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from port_kit.models.wan.transformer.modality_io import TextContext
from port_kit.models.wan.transformer.model import WanFusionTransformer
from port_kit.parallel import cuda_graphs

pytestmark = pytest.mark.gpu

TINY = {"dim": 256, "ffn_dim": 512, "num_heads": 4, "num_layers": 3, "text_dim": 64}


@pytest.fixture(scope="module")
def model() -> Iterator[WanFusionTransformer]:
    """A small transformer of DreamID-Omni with random weights, in bfloat16."""
    from port_kit.models.wan.transformer.config import TRANSFORMER_CONFIG
    from port_kit.models.wan.transformer.model import build_transformer
    from port_kit.runtime.single_process import single_rank

    config = {**TRANSFORMER_CONFIG, **{tower: {**TRANSFORMER_CONFIG[tower], **TINY} for tower in ("video", "audio")}}
    device = torch.device("cuda")
    with torch.inference_mode(), single_rank(dtype=torch.bfloat16, device=device, default_device=False):
        with device:
            built = build_transformer(config).eval().requires_grad_(False)
        for parameter in built.parameters():
            parameter.data.normal_(std=0.05)
        yield built


def branch(seed: int, *, rows: int = 8, batch: int = 1, texts: tuple[TextContext, ...] | None = None) -> dict[str, Any]:
    """Return the arguments of one branch with a reference of each kind."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16, generator=generator)

    video_text, audio_text = texts or (TextContext(draw(batch, 7, 64)), TextContext(draw(batch, 7, 64)))
    return {
        "video": draw(batch, 48, 4, rows, 12),
        "audio": draw(batch, 20, 20),
        "timestep": torch.tensor(900 - seed, device="cuda"),
        "video_text": video_text,
        "audio_text": audio_text,
        "video_reference_frames": 1,
        "audio_reference_lengths": (5,),
    }


def eager(model: nn.Module, calls: list[Mapping[str, Any]]) -> list[Any]:
    """Return the flows of calls without graphs."""
    model.graphs = None
    return [copied(model(**call)) for call in calls]


def graphed(model: WanFusionTransformer, calls: list[Mapping[str, Any]]) -> list[Any]:
    """Return the flows of calls with graphs, each as it is when the next call begins."""
    model.use_cuda_graphs(torch.device("cuda"))
    return [copied(model(**call)) for call in calls]


def copied(flows: Any) -> list[Tensor]:
    pairs = flows if isinstance(flows, list) else [flows]
    return [flow.clone() for pair in pairs for flow in pair]


def assert_equal(found: list[Any], expected: list[Any]) -> None:
    for flows, others in zip(found, expected, strict=True):
        assert all(flow.equal(other) for flow, other in zip(flows, others, strict=True))


def test_steps_of_a_request_are_equal(model: WanFusionTransformer) -> None:
    """Branches of one kind with different texts and timesteps share a graph; a stream that is not used has its own."""
    texts = [(branch(seed)["video_text"], branch(seed)["audio_text"]) for seed in (50, 51)]
    steps = [
        call
        for seed in range(4)
        for call in (
            branch(seed, texts=texts[0]),
            branch(seed + 9, texts=texts[1]),
            {**branch(seed, texts=texts[0]), "unused": "audio"},
            {**branch(seed, texts=texts[0]), "skip_layers": (1,)},
            {**branch(seed, texts=texts[0]), "first_frame_clean": True},
        )
    ]
    found = graphed(model, steps)
    assert model.graphs is not None and model.graphs.cache.captured == 4
    assert_equal(found, eager(model, steps))


def test_several_branches_in_one_call_are_equal(model: WanFusionTransformer) -> None:
    text = branch(7)["video_text"], branch(7)["audio_text"]
    calls = []
    for seed in range(4):
        others = [branch(seed + 20, texts=text), {**branch(seed + 30), "unused": "video"}]
        calls.append({**branch(seed, texts=text), "extra_branches": others})
    found = graphed(model, calls)
    assert model.graphs is not None and model.graphs.cache.captured == 1
    assert_equal(found, eager(model, calls))


def test_shapes_and_batches_that_change(model: WanFusionTransformer) -> None:
    """A shape that comes once is never captured; one that returns after another is."""
    calls = [branch(seed, rows=rows, batch=batch) for seed, (rows, batch) in enumerate([(8, 1), (4, 1), (8, 2)] * 3)]
    calls.append(branch(5, rows=6))
    found = graphed(model, calls)
    assert model.graphs is not None and model.graphs.cache.captured == 3
    assert_equal(found, eager(model, calls))


def test_kinds_are_forgotten(model: WanFusionTransformer) -> None:
    calls = [branch(seed, rows=2 + 2 * (seed // 3)) for seed in range(15)]
    model.use_cuda_graphs(torch.device("cuda"))
    assert model.graphs is not None
    model.graphs.cache.max_kinds = 2
    found = [copied(model(**call)) for call in calls]
    assert model.graphs.cache.captured == 2
    assert_equal(found, eager(model, calls))


def test_without_memory_calls_run_eagerly(model: WanFusionTransformer, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = [branch(seed) for seed in range(4)]

    def refuse(*_: Any) -> None:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(cuda_graphs, "CapturedCall", refuse)
    warned: list[str] = []
    monkeypatch.setattr(cuda_graphs.logger, "warning", lambda text, *values: warned.append(text % values))
    found = graphed(model, calls)
    assert len(warned) == 1 and "no memory" in warned[0]
    assert_equal(found, eager(model, calls))


def test_a_lora_ends_the_use_of_graphs(model: WanFusionTransformer) -> None:
    from vllm.lora.layers import BaseLayerWithLoRA

    class WithLoRA(BaseLayerWithLoRA):
        """Stands for any adapted layer."""

    model.use_cuda_graphs(torch.device("cuda"))
    assert model.graphs is not None and model.graphs.is_usable()
    model.blocks[0].added = WithLoRA()
    try:
        assert not model.graphs.is_usable()
    finally:
        del model.blocks[0].added


@pytest.mark.parametrize(
    ("changes", "possible"),
    [
        ({}, True),
        ({"enable_layerwise_offload": True}, False),
        ({"enable_cpu_offload": True}, False),
        ({"enable_sleep_mode": True}, False),
        ({"cache_backend": "cache_dit"}, False),
        ({"diffusion_kv_cache_skip_steps": "0-3"}, False),
    ],
)
def test_what_forbids_graphs(changes: dict[str, Any], possible: bool) -> None:
    config = {
        "parallel_config": SimpleNamespace(use_hsdp=False),
        "enable_layerwise_offload": False,
        "enable_cpu_offload": False,
        "enable_sleep_mode": False,
        "cache_backend": "none",
        "diffusion_kv_cache_skip_steps": None,
    }
    assert cuda_graphs.graphs_are_possible(SimpleNamespace(**{**config, **changes})) is possible  # type: ignore[arg-type]
