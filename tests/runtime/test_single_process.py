"""A process group of one rank in a separate process."""

from __future__ import annotations

import os
import subprocess
import sys

RUN = """
import torch
from port_kit.runtime.single_process import single_rank

with single_rank(torch.bfloat16) as config:
    print(config.dtype, torch.get_default_dtype(), torch.distributed.get_world_size())
print(torch.get_default_dtype(), torch.distributed.is_initialized())
"""


def test_a_world_of_one_opens_and_closes_without_the_hub() -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    done = subprocess.run([sys.executable, "-c", RUN], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-2:] == ["torch.bfloat16 torch.bfloat16 1", "torch.float32 False"]
