"""The example of joint attention: the flows of one rank under each kind of parallelism."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from port_kit.parallel.meta_init import meta_init
from port_kit.parallel.verify import ParallelTestCase, verify_parallel
from port_kit.testing.workers import Request
from tests.parallel import transformer_pipeline
from tests.parallel.conv_pipeline import write_checkpoint
from tests.parallel.joint_pipeline import load_example

CONFIG = {"channels": 12, "text_dim": 20, "dim": 32, "heads": 4, "hidden": 48, "joint_layers": 2, "single_layers": 2}
#: Audio and text tokens: ranks with both, ranks with one of them, and a padded end in the text and in the audio.
SIZES = ((21, 6), (5, 12), (16, 8), (3, 1))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory with random weights."""
    with meta_init(torch.float32):
        transformer = load_example("transformer").build_transformer(CONFIG)
    return write_checkpoint(tmp_path_factory.mktemp("joint") / "model", "JointPipeline", transformer, CONFIG)


def _case(model: Path, sizes: tuple[tuple[int, int], ...]) -> ParallelTestCase:
    requests = [
        Request("probe", {"num_inference_steps": 1, "seed": 1, "extra_args": {"audio": audio, "text": text}})
        for audio, text in sizes
    ]
    module = "tests.parallel.joint_pipeline"
    return ParallelTestCase(model, requests, setup=lambda _: transformer_pipeline.register("JointPipeline", module))


def test_ranks_compute_the_flow_of_one(model: Path) -> None:
    layouts = ("tp2", "ulysses2", "ring2", "hsdp2", "ulysses2xring2", "tp2xulysses2")
    for report in verify_parallel(_case(model, SIZES), layouts):
        assert report.ok, report.describe()


def test_a_segment_of_which_one_rank_has_all_tokens_is_a_finding(model: Path) -> None:
    """The joint sequence is cut within the text, so convolutions over the audio read no other rank's tokens."""
    (report,) = verify_parallel(_case(model, ((4, 20),)), ("ulysses2",))
    found = {(finding.fault, finding.where.partition(".feed_forward.")[0]) for finding in report.findings}
    assert found == {("not_cut", f"transformer.joint_blocks.{index}.audio") for index in range(2)}
