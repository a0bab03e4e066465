"""The worked port with joint attention and token convolutions: its own tests, and a float64 run of its transformer."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from port_kit.parallel.verify import ParallelTestCase, verify_parallel
from port_kit.pipeline.loading import load_pipeline
from port_kit.port import Port
from port_kit.registry import find_port, list_ports
from port_kit.runtime.plugin import register_pipelines
from port_kit.runtime.single_process import single_rank
from port_kit.testing import download_tiny
from port_kit.testing.workers import Request
from tests.examples.worked_ports import PORTS, run_own_tests
from tests.helpers import slow

#: Latent positions of audio; the text has 64 tokens. Ranks with both, ranks with one of them, a padded end.
LENGTHS = (101, 70, 33, 1)
#: Sums over ranks and sums of one rank each differ from exact ones; the larger difference is allowed twice for both.
MARGIN = 4


@pytest.fixture(scope="module")
def port() -> Iterator[Port]:
    """The port, found in its folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PORT_KIT_PATH", str(PORTS / "audio"))
        patch.syspath_prepend(str(PORTS / "audio"))
        list_ports.cache_clear()
        register_pipelines()  # again: this process may have registered ports before
        yield find_port("murmur")
    list_ports.cache_clear()
    for name in [name for name in sys.modules if name.partition(".")[0] == "murmur"]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def model(port: Port, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory with seeded weights."""
    return Path(download_tiny(port, tmp_path_factory.mktemp("murmur") / "murmur").directory)


def flows(model: Path) -> dict[torch.dtype, list[torch.Tensor]]:
    """Call the transformer on one rank in float32 and in float64, once per length."""
    found: dict[torch.dtype, list[torch.Tensor]] = {torch.float32: [], torch.float64: []}
    with single_rank(torch.float32), torch.inference_mode():
        transformer = load_pipeline(model).transformer
        for dtype, outputs in found.items():
            transformer.to(dtype)
            for length in LENGTHS:
                random = torch.Generator().manual_seed(length)
                latents = torch.randn(1, 12, length, generator=random).to(dtype)
                text = torch.randint(0, 256, (1, 64), generator=random)
                outputs.append(transformer(latents, torch.tensor([0.3], dtype=dtype), text).double())
    return found


def case(model: Path, lengths: tuple[int, ...]) -> ParallelTestCase:
    """Return requests of audio of these lengths."""
    fixed: dict[str, Any] = {"num_inference_steps": 1, "seed": 1}
    requests = [Request("rain", {**fixed, "extra_args": {"audio_length": length / 50}}) for length in lengths]
    return ParallelTestCase(model, requests, output_tolerance=find_port("murmur").output_tolerance)


@pytest.mark.parametrize(
    "layouts", [("ring2", "tp2xulysses2"), *slow(("tp2", "ulysses2", "hsdp2", "ulysses2xring2"))], ids="-".join
)
def test_ranks_are_as_exact_as_one(layouts: tuple[str, ...], port: Port, model: Path) -> None:
    """The tolerance is the error of one rank, which a float64 run of the same module shows."""
    single, exact = flows(model).values()
    error = max(float((a - b).abs().max()) for a, b in zip(single, exact, strict=True))
    assert 0 < error < 1e-4
    for report in verify_parallel(case(model, LENGTHS), layouts, tolerance=MARGIN * error):
        assert report.ok, report.describe()


def test_a_segment_of_which_one_rank_has_all_tokens_is_a_finding(port: Port, model: Path) -> None:
    """The joint sequence is cut within the text, so convolutions over the audio read no other rank's tokens."""
    (report,) = verify_parallel(case(model, (8,)), ("ulysses2",))
    found = {(finding.fault, finding.where.partition(".feed_forward.")[0]) for finding in report.findings}
    assert found == {("not_cut", f"transformer.joint_blocks.{index}.audio") for index in range(2)}


def test_the_port_passes_its_own_tests(tmp_path: Path) -> None:
    """Ranks are compared above, and the engine makes audio of a skeleton in ``tests/serving``."""
    output = run_own_tests("audio", "-m", "not engine", "-k", "not ranks_share and not cache_saves", folder=tmp_path)
    assert "4 passed" in output


@pytest.mark.slow
def test_the_port_passes_all_of_its_tests(tmp_path: Path) -> None:
    assert "7 passed" in run_own_tests("audio", folder=tmp_path)
