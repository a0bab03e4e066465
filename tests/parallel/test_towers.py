"""Towers alone and pairs of unequal towers on several ranks: the flows of one rank, with the work divided."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file
from torch import Tensor

from port_kit.parallel.layout import Layout
from port_kit.parallel.verify import ParallelTestCase, verify_layout
from port_kit.testing.workers import Request
from tests.helpers import slow
from tests.models.unequal_towers import AUDIO, FUSION, VIDEO, fusion_checkpoint, tower_checkpoint
from tests.parallel import tower_pipeline, transformer_pipeline
from tests.parallel.transformer_pipeline import INPUTS, register, write_model

Model = tuple[str, str, dict[str, Any], Callable[[dict[str, Any]], dict[str, Tensor]], list[dict[str, Any]]]

#: Pipeline and its module, configuration, checkpoint, and requests with lengths that the ranks do not divide.
TOWER = "TowerPipeline", tower_pipeline.__name__
MODELS: dict[str, Model] = {
    "video": (*TOWER, VIDEO, tower_checkpoint, [{"latents": (1, 20, 3, 2, 6)}, {"latents": (1, 20, 2, 4, 4)}]),
    "audio": (*TOWER, AUDIO, tower_checkpoint, [{"latents": (1, 31, 10)}, {"latents": (1, 8, 10)}]),
    "pair": ("TransformerOnlyPipeline", transformer_pipeline.__name__, FUSION, fusion_checkpoint, list(INPUTS)),
}


@pytest.mark.parametrize("name", ["video", "pair", *slow("audio")])
def test_ranks_compute_the_flows_of_one(name: str, tmp_path: Path) -> None:
    pipeline, module, config, checkpoint, inputs = MODELS[name]
    transformer = write_model(tmp_path / "model", pipeline, config)
    save_file(checkpoint(config), transformer / "model.safetensors")
    requests = [Request("probe", {"num_inference_steps": 1, "seed": 1, "extra_args": extra}) for extra in inputs]
    case = ParallelTestCase(tmp_path / "model", requests, setup=lambda _world: register(pipeline, module))
    single = case.run(Layout())[0]
    assert all(max(flow.abs().max() for flow in flows) > 0.1 for flows in single.probe.flows)  # an unused one is 0
    for layout in ("tp2xulysses2", "hsdp2"):
        report = verify_layout(case, Layout.parse(layout), single)
        assert report.ok, report.findings
        assert max(report.max_abs, report.output_max_abs) <= 5e-6
