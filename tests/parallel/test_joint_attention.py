"""The example of joint attention: the flows of one rank under each kind of parallelism."""

from __future__ import annotations

from pathlib import Path

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


def test_ranks_compute_the_flow_of_one(tmp_path: Path) -> None:
    with meta_init(torch.float32):
        model = load_example("transformer").build_transformer(CONFIG)
    folder = write_checkpoint(tmp_path / "model", "JointPipeline", model, CONFIG)
    requests = [
        Request("probe", {"num_inference_steps": 1, "seed": 1, "extra_args": {"audio": audio, "text": text}})
        for audio, text in SIZES
    ]
    module = "tests.parallel.joint_pipeline"
    case = ParallelTestCase(
        folder, requests, setup=lambda _world: transformer_pipeline.register("JointPipeline", module)
    )
    for report in verify_parallel(case, ("tp2", "ulysses2", "ring2", "hsdp2", "ulysses2xring2", "tp2xulysses2")):
        assert report.ok, report.describe()
