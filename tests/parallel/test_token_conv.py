"""Convolutions over tokens on several ranks: the outputs of one rank, whose convolutions are those of torch."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from port_kit.parallel import token_conv
from port_kit.parallel.halo import with_halo
from port_kit.parallel.linear import tp_rank_and_size
from port_kit.parallel.meta_init import meta_init
from port_kit.parallel.preflight import describe_model
from port_kit.parallel.token_conv import TokenConv
from port_kit.parallel.verify import ParallelTestCase, verify_parallel
from port_kit.runtime.single_process import single_rank
from port_kit.testing.workers import Request, run_workers
from tests.helpers import raises, slow
from tests.parallel import transformer_pipeline
from tests.parallel.conv_pipeline import REFERENCE, GridTransformer, example, write_checkpoint

CONFIG = {"channels": 16, "dim": 16, "heads": 4, "layers": 2}


def _case(model: Path, pipeline: str, extras: Sequence[dict[str, object]]) -> ParallelTestCase:
    requests = [Request("probe", {"num_inference_steps": 1, "seed": 1, "extra_args": extra}) for extra in extras]
    module = "tests.parallel.conv_pipeline"
    return ParallelTestCase(model, requests, setup=lambda _world: transformer_pipeline.register(pipeline, module))


@pytest.mark.parametrize(
    "layouts", [("ring2", "tp2xulysses2"), *slow(("tp2", "ulysses2", "ulysses2xring2", "hsdp2"))], ids="-".join
)
def test_the_example_of_the_guide_on_several_ranks(layouts: tuple[str, ...], tmp_path: Path) -> None:
    """Lengths: padded, divisible, and two that leave a rank of four with no token, or with fewer than a kernel."""
    with meta_init(torch.float32):
        model = example("Convolutions over tokens")["AudioTransformer"](**CONFIG)
    shape = describe_model(model)
    assert (shape.heads, shape.widths) == (4, 16)
    convs = [module for module in model.modules() if isinstance(module, TokenConv) and module.split_channels]
    assert shape.split_bytes >= 4 * sum(conv.weight.numel() for conv in convs)
    folder = write_checkpoint(tmp_path / "m", "ConvPipeline", model, CONFIG)
    case = _case(folder, "ConvPipeline", [{"tokens": tokens} for tokens in (13, 16, 9, 2)])
    for report in verify_parallel(case, layouts):
        assert report.ok, report.describe()


def test_the_layer_norm_of_the_reference_on_two_ranks(tmp_path: Path) -> None:
    """The code of ``docs/port_reference.md`` is a layer norm over the width of both ranks."""
    with meta_init(torch.float32):
        model = example("Convolutions over tokens")["AudioTransformer"](**CONFIG)
    folder = write_checkpoint(tmp_path / "m", "ConvPipeline", model, CONFIG)
    norm = example("Norms over a sharded axis", REFERENCE)["full_width_layer_norm"]
    x, weight, bias = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0)) + 2

    def probe(_pipeline: nn.Module) -> Tensor:
        own = [part.chunk(2, -1)[tp_rank_and_size()[0]] for part in (x, weight[0], bias[0])]
        return norm(*own, 1e-5)

    case = _case(folder, "ConvPipeline", [{"tokens": 2}])
    config = {"parallel_config": {"tensor_parallel_size": 2}}
    results = run_workers(folder, case.requests, config=config, setup=partial(case.setup, 2), probe=probe)
    whole = torch.cat([result.probe for result in results], -1)
    torch.testing.assert_close(whole, F.layer_norm(x, (8,), weight[0], bias[0], 1e-5))


def test_a_missing_exchange_shows_in_the_outputs(tmp_path: Path) -> None:
    """The comparison with one rank fails if convolutions read no tokens of other ranks."""
    with meta_init(torch.float32):
        model = example("Convolutions over tokens")["AudioTransformer"](**CONFIG)
    case = _case(write_checkpoint(tmp_path / "m", "ConvPipeline", model, CONFIG), "ConvPipeline", [{"tokens": 13}])

    def setup(ranks: int) -> None:
        transformer_pipeline.register("ConvPipeline", "tests.parallel.conv_pipeline")
        if ranks > 1:
            token_conv.with_halo = lambda x, dim, _halo, counts, rank, _gather: (x.narrow(dim, 0, counts[rank]), 0)

    (report,) = verify_parallel(replace(case, setup=setup), ("ulysses2",))
    assert [finding.fault for finding in report.findings] == ["outputs_differ"]


def test_a_length_that_no_rank_boundary_cuts_is_a_finding(tmp_path: Path) -> None:
    with meta_init(torch.float32):
        model = example("Convolutions over tokens")["AudioTransformer"](**CONFIG)
    case = _case(write_checkpoint(tmp_path / "m", "ConvPipeline", model, CONFIG), "ConvPipeline", [{"tokens": 1}])
    (report,) = verify_parallel(case, ("ulysses2",))
    assert report.max_abs <= 5e-6
    uncut = {finding.where.removeprefix("transformer.") for finding in report.findings if finding.fault == "not_cut"}
    convs = {f"blocks.{index}.{name}" for index in range(2) for name in ("up", "down")}
    assert uncut == {"shard", "gather", *convs}


def test_grids_are_split_within_frames_and_rows(tmp_path: Path) -> None:
    """The second grid has frames of more tokens than a rank, so edges come from several ranks."""
    with meta_init(torch.float32):
        model = GridTransformer()
    grids = [{"grid": (5, 3, 4)}, {"grid": (2, 5, 7)}, {"grid": (3, 1, 2)}]
    case = _case(write_checkpoint(tmp_path / "m", "GridPipeline", model, {}), "GridPipeline", grids)
    for report in verify_parallel(case, ("ulysses2", "ring3", "tp2xulysses2")):
        assert report.ok, report.describe()


@pytest.mark.parametrize(("kernel", "dilation", "groups"), [(3, 1, 1), (5, 2, 4), (1, 1, 1)])
def test_one_rank_has_the_outputs_of_a_convolution_of_torch(kernel: int, dilation: int, groups: int) -> None:
    with single_rank():
        conv = TokenConv(8, 12, kernel, dilation=dilation, groups=groups)
    x = torch.randn(2, 9, 8)
    for parameter in conv.parameters():
        torch.nn.init.normal_(parameter)
    reach = kernel // 2 * dilation
    expected = F.conv1d(x.mT, conv.weight, conv.bias, padding=reach, dilation=dilation, groups=groups).mT
    torch.testing.assert_close(conv(x, 9), expected)
    parts = [conv(x[:, :4], (4, 5), segment=0), conv(x[:, 4:], (4, 5), segment=1)]
    torch.testing.assert_close(parts[0], F.conv1d(x[:, :4].mT, conv.weight, conv.bias, 1, reach, dilation, groups).mT)
    assert torch.cat(parts, 1).shape == expected.shape


@pytest.mark.parametrize("kernel", [(3, 1, 1), (3, 3, 3), (1, 3, 5), (3, 1, 3)])
def test_one_rank_has_the_outputs_over_a_grid(kernel: tuple[int, int, int]) -> None:
    with single_rank():
        conv = TokenConv(4, 6, kernel, dilation=(2, 1, 1))
    for parameter in conv.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(2, 4, 5, 3, 7)
    pad = (2 * (kernel[0] // 2), kernel[1] // 2, kernel[2] // 2)
    expected = F.conv3d(x, conv.weight, conv.bias, padding=pad, dilation=(2, 1, 1))
    actual = conv(x.flatten(2).mT, 105, grid=(3, 7)).mT.unflatten(2, (5, 3, 7))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_kernels_groups_and_tokens_that_do_not_fit_are_refused() -> None:
    with single_rank():
        conv = TokenConv(4, 4, 3)
        with raises("parallel_conv", "4"):
            TokenConv(4, 4, 4)
        with raises("parallel_conv", "grouped"):
            TokenConv(4, 4, 3, groups=2, role="column")
    with raises("parallel_tokens", "8", "9"):
        conv(torch.zeros(1, 8, 4), 9)
    with raises("parallel_tokens", "2 x 2"):
        conv(torch.zeros(1, 9, 4), 9, grid=(2, 2))
    with meta_init(torch.float32, ranks=3), raises("parallel_degree", "3", "4"):
        TokenConv(4, 4, 3, role="row")


@pytest.mark.parametrize("counts", [(4, 4, 2), (1, 1, 1), (2, 0, 3), (0, 5, 0), (3, 0, 0)])
@pytest.mark.parametrize("halo", [0, 1, 3, 9])
def test_a_halo_reaches_over_several_ranks(counts: tuple[int, ...], halo: int) -> None:
    total, width = torch.arange(sum(counts) * 2).view(1, -1, 2), max(counts)
    edges: list[Tensor | None] = [None] * len(counts)
    barrier = threading.Barrier(len(counts), timeout=20)
    results: dict[int, tuple[Tensor, int]] = {}

    def run(rank: int) -> None:
        def gather(own: Tensor) -> list[Tensor]:
            edges[rank] = own
            barrier.wait()
            return edges

        start = sum(counts[:rank])
        own = total[:, start : start + counts[rank]]
        padded = F.pad(own, (0, 0, 0, width - counts[rank]), value=-1)
        results[rank] = with_halo(padded, 1, halo, counts, rank, gather)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(counts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    for rank, count in enumerate(counts):
        start = sum(counts[:rank])
        first = max(0, start - halo)
        found, before = results[rank]
        assert before == start - first
        assert torch.equal(found, total[:, first : start + count + halo])
