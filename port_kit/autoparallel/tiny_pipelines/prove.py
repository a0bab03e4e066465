"""Comparison of a tiny pipeline on several ranks with one rank, by vLLM-Omni's own workers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from port_kit.autoparallel.host.checks import PLAN_KEY
from port_kit.autoparallel.host.index import PipelineIndex
from port_kit.autoparallel.tiny_pipelines import CASES, write_pipeline
from port_kit.parallel.layout import Layout
from port_kit.parallel.memory import local_bytes
from port_kit.runtime.hosts import host_of
from port_kit.runtime.plugin import register_pipelines
from port_kit.testing.workers import Request, run_workers


@dataclass(frozen=True)
class Work:
    """Work of one rank.

    Attributes:
        calls: complete calls of the transformer.
        weight_bytes: bytes of the transformers' weights that it holds.
        exchanges: attention calls whose tokens or keys were exchanged between ranks.
    """

    calls: float
    weight_bytes: int
    exchanges: int


@dataclass(frozen=True)
class Comparison:
    """One layout of one pipeline.

    Attributes:
        difference: largest difference from one rank, relative to the largest value, over all media.
        spread: standard deviation of the media; 0 if they are constant.
        single: work of one rank.
        ranks: work of each rank of the layout.
    """

    difference: float
    spread: float
    single: Work
    ranks: tuple[Work, ...]


def run(name: str, folder: Path, layout: str, *, plan: Path | None = None, timeout: float = 300.0) -> list[Any]:
    """Run the request of a tiny pipeline in a layout; return the ranks' results; the probe is their :class:`Work`."""
    index = PipelineIndex.read(folder)
    config = {
        "model_class_name": host_of(index.output_type),
        "parallel_config": Layout.parse(layout).parallel_config,
        "additional_config": {} if plan is None else {PLAN_KEY: str(plan)},
    }
    return run_workers(
        folder,
        [Request(*CASES[name].request())],
        config=config,
        setup=register_pipelines,
        probe=_work,
        timeout=timeout,
    )


def compare(name: str, folder: Path, layouts: list[str], *, plan: Path | None = None) -> dict[str, Comparison]:
    """Build a tiny pipeline, and compare layouts with one rank.

    Args:
        name: key of :data:`~port_kit.autoparallel.tiny_pipelines.CASES`.
        folder: an empty folder, or that of an earlier call.
        layouts: as ``port-kit layout`` writes them.
        plan: plan file for layouts other than guidance.
    """
    if not (folder / "model_index.json").is_file():
        write_pipeline(name, CASES[name], folder)
    single = run(name, folder, "single")[0]
    found = {}
    for layout in layouts:
        ranks = run(name, folder, layout, plan=plan)
        differences = [_difference(rank.outputs[0], single.outputs[0]) for rank in ranks]
        spread = min(float(value.std()) for value in single.outputs[0].values() if isinstance(value, torch.Tensor))
        found[layout] = Comparison(max(differences), spread, single.probe, tuple(rank.probe for rank in ranks))
    return found


def _work(pipeline: Any) -> Work:
    sharded = [adapted.sharded for adapted in pipeline.adapted.values() if adapted.sharded is not None]
    return Work(
        calls=pipeline.computed if pipeline.guidance is None else pipeline.guidance.computed,
        weight_bytes=sum(local_bytes(getattr(pipeline, name)) for name in pipeline.index.denoisers),
        exchanges=sum(sum(model.exchanges().values()) for model in sharded),
    )


def _difference(one: dict[str, Any], other: dict[str, Any]) -> float:
    assert one.keys() == other.keys()
    found = 0.0
    for name, value in other.items():
        if isinstance(value, torch.Tensor):
            assert one[name].shape == value.shape, (name, one[name].shape, value.shape)
            assert bool(value.isfinite().all()), f"{name} is not finite"
            found = max(found, float((one[name] - value).abs().max() / value.abs().max()))
    return found
