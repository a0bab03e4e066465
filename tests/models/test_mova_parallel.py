"""MOVA's tiny model on several ranks, with weights that are sharded, offloaded or not computed again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from port_kit.models.mova import PORT, config
from port_kit.models.mova.model import bridge
from port_kit.models.mova.model.bridge import build_bridge
from port_kit.models.mova.model.transformer import DualTowerTransformer, build_audio_transformer, build_transformer
from port_kit.parallel.layout import Layout
from port_kit.parallel.linear import tp_rank_and_size
from port_kit.parallel.norm import square_sums
from port_kit.parallel.preflight import describe_model, preflight
from port_kit.parallel.sequence import PaddedAttention, make_sp_plan
from port_kit.parallel.verify import ParallelTestCase, port_test_case, verify_layout
from port_kit.pipeline.loading import load_pipeline
from port_kit.runtime.single_process import single_rank
from port_kit.testing.workers import RankResult, Request, run_workers
from tests.helpers import raises, slow

LAYOUTS = ("tp2", "ulysses2xcfg2")
SLOW = ("hsdp2", "tp4", "ulysses4", "ring2", "ring3", "allgather2", "hsdp2xcfg2", "ulysses2xring2", "tp2xulysses2")
#: Enough for the default four steps of warm-up in both towers, and some reuse after them.
STEPS = 16


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> ParallelTestCase:
    return port_test_case(PORT, tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def single(case: ParallelTestCase) -> RankResult:
    return case.run(Layout())[0]


def test_degrees_follow_from_both_towers() -> None:
    """Tensor parallelism divides all heads, 40 and 12; Ulysses only those of the video, as audio is gathered."""
    configs = [config.TRANSFORMER_CONFIG, config.TRANSFORMER_CONFIG]
    with single_rank(torch.bfloat16), torch.device("meta"):
        parts = [*map(build_transformer, configs), build_audio_transformer(config.AUDIO_TRANSFORMER_CONFIG)]
        shape = describe_model(*parts, build_bridge(config.BRIDGE_CONFIG), branches=PORT.guidance_branches)
    assert (shape.heads, shape.ulysses_heads) == (4, 40)
    assert shape.weight_bytes == 2 * (2 * 14_288_901_184 + 1_419_193_472 + 2_659_737_600)
    assert preflight(Layout.parse("ulysses8xcfg2"), shape).idle_ranks == 0
    for layout in ("tp8", "ulysses16", "tp4xulysses4"):
        with raises("parallel_degree"):
            preflight(Layout.parse(layout), shape)


@pytest.mark.parametrize("layout", [*LAYOUTS, *slow(*SLOW)])
def test_ranks_compute_the_result_of_one(layout: str, case: ParallelTestCase, single: RankResult) -> None:
    parsed = Layout.parse(layout)
    report = verify_layout(case, parsed, single)
    assert report.ok, report.findings
    assert report.max_abs is not None and report.max_abs <= 5e-6
    whole, *held = report.parameter_bytes
    assert all(size / whole <= 1 / (parsed.tp * parsed.hsdp) + 0.08 for size in held)


def attended_padding() -> None:
    whole = PaddedAttention.forward
    PaddedAttention.forward = lambda self, q, k, v, length=None: whole(self, q, k, v)  # type: ignore[method-assign]


def whole_audio() -> None:
    """Only the video is sharded; every rank computes all of the audio."""
    DualTowerTransformer._sp_plan = make_sp_plan({"shard": (3, 4, 4)}, {"gather": (3,)})  # type: ignore[misc]


def local_norm() -> None:
    """In the bridge, every rank takes its own heads for all of them."""
    bridge.tp_square_sums = lambda *tensors: [square_sums(x) * tp_rank_and_size()[1] for x in tensors]  # type: ignore


@pytest.mark.slow
@pytest.mark.parametrize(
    ("plant", "layout", "fault", "where"),
    [
        (attended_padding, "ulysses4", "padding_attended", "audio_transformer."),
        (whole_audio, "ulysses4", "not_sharded", "audio_transformer."),
        (local_norm, "tp4", "outputs_differ", "bridge."),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_planted_fault_is_found_and_named(
    plant: Callable[[], None], layout: str, fault: str, where: str, case: ParallelTestCase, single: RankResult
) -> None:
    faulty = replace(case, setup=lambda ranks: plant() if ranks > 1 else None)
    report = verify_layout(faulty, Layout.parse(layout), single)
    assert not report.ok
    found = {(finding.fault, finding.where) for finding in report.findings}
    assert any(name == fault and place.startswith(where) for name, place in found), found


def test_a_step_of_each_tower_is_compared(single: RankResult) -> None:
    paths = {path.partition(".")[0] for path in single.probe.attention}
    assert {"transformer", "transformer_2", "audio_transformer", "bridge"} <= paths
    assert single.probe.calls == 4


@pytest.mark.parametrize("layout", ["ulysses2", *slow("ring2", "allgather2")])
def test_video_keys_stay_on_their_rank(layout: str, case: ParallelTestCase, single: RankResult) -> None:
    """Audio queries travel to them; video queries see the gathered audio."""
    ranks = [result.probe for result in case.run(Layout.parse(layout))]
    for path, alone in single.probe.attention.items():
        calls = [trace.attention[path] for trace in ranks]
        if path.endswith("video_to_audio.attn"):
            assert all(call.exchanged and call.seen <= call.key < alone[0].key for own in calls for call in own)
            assert all(sum(call.seen for call in same) == alone[0].key for same in zip(*calls, strict=True))
        if path.endswith("audio_to_video.attn"):
            assert all(call.exchanged and call.seen == alone[0].key for own in calls for call in own)


def test_shared_modules_are_sharded_with_the_towers(case: ParallelTestCase) -> None:
    def dtensors(pipeline: nn.Module) -> dict[str, tuple[int, int]]:
        return {
            name: (sum(hasattr(p, "to_local") for p in part.parameters()), sum(1 for _ in part.parameters()))
            for name in ("transformer", "transformer_2", "audio_transformer", "bridge")
            if (part := pipeline.get_submodule(name)) is not None
        }

    config = {"parallel_config": Layout.parse("hsdp2").parallel_config}
    for result in run_workers(case.model, case.requests, config=config, probe=dtensors):
        for name, (sharded, total) in result.probe.items():
            assert sharded == total > 0, name


@dataclass
class Moves:
    """Calls of vLLM-Omni's hooks that move a component: which one, and to where.

    Attributes:
        names: of components, by identity.
        log: (target, component) in order.
        present: components on the device, of those that may leave it.
    """

    names: dict[int, str]
    log: list[tuple[str, str]] = field(default_factory=list)
    present: set[str] = field(default_factory=set)

    def move(self, module: nn.Module, target: str) -> None:
        name = self.names[id(module)]
        self.log.append((target, name))
        (self.present.add if target == "device" else self.present.discard)(name)
        assert len(self.present) <= 1, "they exclude each other"


@pytest.fixture
def offloaded(case: ParallelTestCase, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, Moves, Any]]:
    """A pipeline, the moves of its components, and vLLM-Omni's backend, which is not yet enabled for it."""
    from vllm_omni.diffusion.offloader import ModelLevelOffloadBackend, OffloadConfig, OffloadStrategy
    from vllm_omni.diffusion.offloader.sequential_backend import SequentialOffloadHook

    with single_rank(torch.float32), torch.inference_mode():
        pipeline = load_pipeline(case.model)
        moves = Moves({id(module): name for name, module in pipeline.named_children()})
        monkeypatch.setattr(SequentialOffloadHook, "_to_cpu", lambda self, module: moves.move(module, "host"))
        monkeypatch.setattr(SequentialOffloadHook, "_to_gpu", lambda self, module: moves.move(module, "device"))
        config = OffloadConfig(OffloadStrategy.MODEL_LEVEL)
        yield pipeline, moves, ModelLevelOffloadBackend(config, torch.device("cpu"))


def test_offload_keeps_one_video_tower_on_the_device(offloaded: tuple[Any, Moves, Any], case: ParallelTestCase) -> None:
    pipeline, moves, backend = offloaded
    backend.enable(pipeline)
    prompt, sampling = _request(case.requests[0])
    (state,) = pipeline.begin(pipeline.prepare(prompt, sampling))
    assert moves.present == {"text_encoder"}
    moves.log.clear()
    while not state.is_done:
        pipeline.scheduler_step(state, *pipeline.predict([state]))
    high = [("host", "text_encoder"), ("host", "transformer_2"), ("device", "transformer")]
    low = [("host", "text_encoder"), ("host", "transformer"), ("device", "transformer_2")]
    assert moves.log == [*high, *high, *low, *low]
    moves.log.clear()
    backend.disable()
    pipeline.predict(pipeline.begin(pipeline.prepare(prompt, sampling)))
    assert moves.log == []


def test_memory_of_each_component_that_waits_is_pinned_at_start_up(offloaded: tuple[Any, Moves, Any]) -> None:
    """Each one visits the device alone, since the way back pins it."""
    pipeline, moves, backend = offloaded
    backend.enable(pipeline)
    waiting = ["text_encoder", "transformer", "transformer_2"]
    assert sorted(name for target, name in moves.log if target == "device") == waiting
    assert all(("host", name) in moves.log[moves.log.index(("device", name)) :] for name in waiting)
    assert moves.present == set()


@pytest.mark.parametrize("options", [{"pin_cpu_memory": False}, {"use_hsdp": True}], ids=lambda value: [*value][0])
def test_nothing_visits_the_device_if_nothing_is_pinned(
    options: dict[str, bool], offloaded: tuple[Any, Moves, Any]
) -> None:
    pipeline, moves, backend = offloaded
    backend.config = replace(backend.config, **options)
    backend.enable(pipeline)
    assert moves.log == []
    pipeline.text_encoder(torch.ones(1, 2, dtype=torch.long), torch.ones(1, 2, dtype=torch.long))
    assert moves.present == {"text_encoder"}


def test_components_that_are_not_selected_stay_on_the_device(
    offloaded: tuple[Any, Moves, Any], case: ParallelTestCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline, moves, backend = offloaded
    placed: list[str] = []
    for name, module in pipeline.named_children():
        monkeypatch.setattr(module, "to", lambda device, name=name: placed.append(name))
    backend.config = replace(backend.config, components=frozenset({"dit"}))
    backend.enable(pipeline)
    assert sorted(placed) == ["audio_transformer", "audio_vae", "bridge", "text_encoder", "vae"]
    assert [name for target, name in moves.log if target == "device"] == ["transformer", "transformer_2"]


def test_layerwise_offload_streams_the_blocks_of_the_towers(case: ParallelTestCase) -> None:
    from vllm_omni.diffusion.offloader.block_discovery import get_blocks_from_dit

    with single_rank(torch.float32):
        pipeline = load_pipeline(case.model)
    for name in ("transformer", "transformer_2"):
        names, blocks = get_blocks_from_dit(getattr(pipeline, name))
        assert names == ["blocks"] and len(blocks) == 3


def _request(request: Request) -> tuple[Any, Any]:
    from vllm_omni.inputs.data import OmniDiffusionSamplingParams

    return request.prompt, OmniDiffusionSamplingParams(**request.sampling)


def watch() -> None:
    """Make pipelines of this process keep their last latents, count computed layers and look at their contexts."""
    from port_kit.models.mova.model.transformer import BridgedBlock
    from port_kit.models.mova.pipeline import MOVAPipeline
    from port_kit.pipeline.caching import BranchCacheContexts

    seen: dict[str, Any] = {"computed": 0, "contexts": []}
    MOVAPipeline.seen = seen  # type: ignore[attr-defined]
    make, forward, install = MOVAPipeline.__init__, BridgedBlock.forward, BranchCacheContexts.__call__

    def keep(self: Any, **options: Any) -> None:
        make(self, **options)
        self.on_step = lambda step: seen.update(latents=tuple(step.latents.values()))

    def count(self: Any, *args: Any, **options: Any) -> Any:
        seen["computed"] += 1
        return forward(self, *args, **options)

    def look(self: Any, *args: Any) -> None:
        install(self, *args)
        held = [len(kept) for hook in (self, *self.others) for kept in hook.kept.values()]
        seen["contexts"].append(held)

    MOVAPipeline.__init__, BridgedBlock.forward = keep, count  # type: ignore[method-assign, assignment]
    BranchCacheContexts.__call__ = look  # type: ignore[method-assign]


def run_cached(
    model: Path, request: Request, cache: dict[str, Any] | None
) -> tuple[list[Tensor], int, list[list[int]]]:
    """Serve a request twice; return the second's latents, the layers computed for both, and the contexts per call."""
    config: dict[str, Any] = {} if cache is None else {"cache_backend": "cache_dit", "cache_config": cache}

    def probe(pipeline: nn.Module) -> tuple[list[Tensor], int, list[list[int]]]:
        seen = type(pipeline).seen  # type: ignore[attr-defined]
        return [value.cpu() for value in seen["latents"]], seen["computed"], seen["contexts"]

    (result,) = run_workers(model, [request, request], config=config, setup=watch, probe=probe)
    return result.probe


def test_a_cache_has_contexts_per_tower_and_branch(case: ParallelTestCase) -> None:
    """Without reuse it has no effect; with reuse it omits layers; no context survives the change of the tower."""
    (request,) = case.requests
    request = Request(request.prompt, {**request.sampling, "num_inference_steps": STEPS})
    plain, computed, _ = run_cached(case.model, request, None)
    exact, same, contexts = run_cached(case.model, request, {"residual_diff_threshold": 0.0})
    assert same == computed
    assert all(torch.equal(a, b) for a, b in zip(plain, exact, strict=True))
    assert set(map(tuple, contexts)) == {(1,), (2,)}, "contexts of the two branches of one tower"
    reused, fewer, _ = run_cached(case.model, request, {"residual_diff_threshold": 0.9})
    assert fewer < 0.9 * computed
    assert 0 < max((a - b).abs().max() for a, b in zip(plain, reused, strict=True)) < 1.0
