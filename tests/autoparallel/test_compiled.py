"""Regional compilation of modules to which a plan was applied."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from port_kit.parallel.layout import Layout
from port_kit.testing.workers import run_ranks, warm_up

WAN, FLUX = "WanTransformer3DModel", "FluxTransformer2DModel"


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        (WAN, "ulysses2"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in ((WAN, "single"), (WAN, "tp2"), (FLUX, "ulysses2"), (FLUX, "tp2"))
        ),
    ],
)
def test_compiled_blocks_equal_the_unmodified_module(
    name: str, layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    warm_up()
    degrees = Layout.parse(layout)
    for output, expected, graphs in run_ranks(degrees.world, lambda rank: _run(name, degrees, rank, tmp_path)):
        assert (output - expected).abs().max() <= 1e-4 * expected.abs().max()
        few, many = graphs
        assert 1 < few == many  # deeper modules run the code that was compiled for the first blocks


def _run(name: str, layout: Layout, rank: int, folder: Path) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """Return the output of the compiled module, that of the unmodified one, and the graphs of two depths."""
    from port_kit.autoparallel.engine_groups import engine_groups
    from port_kit.autoparallel.plan import Plan
    from port_kit.autoparallel.prove_rank import apply_plan
    from port_kit.autoparallel.shipped import shipped_plan
    from port_kit.autoparallel.subject import ModelScale, TokenScale, load_subject

    path = shipped_plan(name)
    assert path is not None
    subject, plan = load_subject(name), Plan.load(path)
    graphs = []
    with torch.no_grad(), engine_groups(layout, rank, folder / "rendezvous", torch.float32) as config:
        for depth in (1, 2):
            scale = ModelScale(depth=depth)
            inputs = subject.inputs(TokenScale(image=1, text=1), scale)
            (expected,) = subject.output(subject.build(scale)(**inputs))
            module: nn.Module = subject.build(scale)
            apply_plan(module, plan, layout, config, torch.float32)
            count = _compile(module)
            (output,) = subject.output(module(**inputs))
            graphs.append(len(count))
    return output, expected, (graphs[0], graphs[1])


def _compile(module: nn.Module) -> list[torch.fx.GraphModule]:
    """Compile the blocks as vLLM-Omni's worker does; return the list of graphs, which grows as they are compiled."""
    from vllm_omni.diffusion.compile import regionally_compile

    torch.compiler.reset()
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    regionally_compile(module, backend=keep, dynamic=True)
    return graphs
