"""Regional compilation of modules to which a plan was applied, on two ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from port_kit.parallel.layout import Layout
from port_kit.testing.workers import run_ranks, warm_up


@pytest.mark.parametrize("layout", ["single", "ulysses2", "tp2"])
@pytest.mark.parametrize("name", ["WanTransformer3DModel", "FluxTransformer2DModel"])
def test_compiled_blocks_equal_the_unmodified_module(name: str, layout: str, tmp_path: Path) -> None:
    warm_up()
    degrees = Layout.parse(layout)
    for output, expected, graphs in run_ranks(degrees.world, lambda rank: _run(name, degrees, rank, tmp_path)):
        assert graphs > 1  # something was compiled
        assert (output - expected).abs().max() <= 1e-4 * expected.abs().max()


def _run(name: str, layout: Layout, rank: int, folder: Path) -> tuple[Tensor, Tensor, int]:
    """Return the output of the compiled module, that of the unmodified one, and the number of compiled graphs."""
    from vllm_omni.diffusion.compile import regionally_compile

    from port_kit.autoparallel.engine_groups import engine_groups
    from port_kit.autoparallel.plan import Plan
    from port_kit.autoparallel.prove_rank import apply_layout
    from port_kit.autoparallel.shipped import shipped_plan
    from port_kit.autoparallel.subject import ModelScale, TokenScale, load_subject

    graphs = 0

    def count(graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> torch.fx.GraphModule:
        nonlocal graphs
        graphs += 1
        return graph

    path = shipped_plan(name)
    assert path is not None
    subject, plan = load_subject(name), Plan.load(path)
    with torch.no_grad(), engine_groups(layout, rank, folder / "rendezvous", torch.float32) as config:
        inputs = subject.inputs(TokenScale(image=1, text=1), ModelScale())
        (expected,) = subject.output(subject.build(ModelScale())(**inputs))
        module: nn.Module = subject.build(ModelScale())
        apply_layout(module, plan, layout, config, torch.float32)
        regionally_compile(module, backend=count, dynamic=True)
        (output,) = subject.output(module(**inputs))
    return output, expected, graphs
