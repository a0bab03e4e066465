"""Hosted pipelines through ``Omni``: an engine per layout, in this process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from port_kit.autoparallel.host.checks import PLAN_KEY, check_ran
from port_kit.autoparallel.host.index import PipelineIndex
from port_kit.parallel.layout import Layout
from port_kit.runtime.hosts import host_of


@dataclass(frozen=True)
class Generated:
    """Result of one request.

    Attributes:
        media: arrays by name: ``image0``, ``image1``, ... for images and videos, and ``audio``.
        work: of rank 0; see :attr:`port_kit.autoparallel.host.pipeline.HostPipeline.work`.
    """

    media: Mapping[str, np.ndarray]
    work: Mapping[str, Any]

    def difference(self, other: Generated) -> float:
        """Return the largest difference relative to the largest value; infinite if media differ in kind or shape."""
        shapes = ({name: value.shape for name, value in each.media.items()} for each in (self, other))
        if next(shapes) != next(shapes):
            return float("inf")
        worst = 0.0
        for name, value in other.media.items():
            delta = np.abs(self.media[name].astype(np.float64) - value).max() / np.abs(value).max()
            worst = max(worst, float(delta) if np.isfinite(delta) else float("inf"))
        return worst

    @property
    def spread(self) -> float:
        """Least standard deviation of the media; 0 if one is constant."""
        return min(float(value.std()) for value in self.media.values())


def generate(
    folder: Path | str,
    request: tuple[dict[str, Any], dict[str, Any]],
    layout: Layout,
    plan: Path | str | None = None,
    *,
    requests: int = 1,
    **options: Any,
) -> Generated:
    """Start an engine in float32, run a request, and stop the engine.

    Args:
        folder: directory of a pipeline of diffusers.
        request: prompt, and fields of ``OmniDiffusionSamplingParams``.
        layout: layout of the engine.
        plan: plan file; None if the layout needs none.
        requests: number of equal requests; the result is that of the last one.
        options: further arguments of ``Omni``.

    Raises:
        ParallelError: ``parallel_degree``; the engine ran another layout.
    """
    from vllm_omni import Omni
    from vllm_omni.inputs.data import OmniDiffusionSamplingParams

    omni = Omni(
        model=str(folder),
        model_class_name=host_of(PipelineIndex.read(folder).output_type),
        dtype="float32",
        enforce_eager=True,
        additional_config={} if plan is None else {PLAN_KEY: str(plan)},
        **layout.parallel_config,
        **options,
    )
    try:
        prompt, sampling = request
        for _ in range(requests):
            (result,) = omni.generate(prompt, OmniDiffusionSamplingParams(**sampling), use_tqdm=False)
    finally:
        omni.close()
    return generated(result, layout)


def generated(result: Any, layout: Layout) -> Generated:
    """Return the media and the work of a result of ``Omni.generate``.

    Args:
        result: the result.
        layout: layout that was asked for.

    Raises:
        ParallelError: ``parallel_degree``; the engine ran another layout.
    """
    media = {f"image{index}": np.asarray(image) for index, image in enumerate(result.images)}
    audio = result.multimodal_output.get("audio")
    if audio is not None:
        media["audio"] = np.asarray(audio)
    return Generated(media, check_ran(result, layout))
