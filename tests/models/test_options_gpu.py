"""Options for one small GPU, on a GPU: eight-bit weights and blocks that are streamed from the host's memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

RUN = """
import json, sys
import numpy as np
from vllm_omni import Omni
from vllm_omni.inputs.data import OmniDiffusionSamplingParams

omni = Omni(model=sys.argv[1], enforce_eager=True, **json.loads(sys.argv[2]))
try:
    sampling = OmniDiffusionSamplingParams(num_inference_steps=2, seed=3)
    (result,) = omni.generate({"prompt": "rain"}, sampling, py_generator=True)
    np.save(sys.argv[3], np.asarray(result.images[0]))
finally:
    omni.close()
"""


def frames(model: Path, options: str, file: Path) -> Path:
    """Generate in a process of its own, which gives the GPU back."""
    command = [sys.executable, "-c", RUN, str(model), options, str(file)]
    done = subprocess.run(command, env=os.environ, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return file


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("options", "levels"),
    [('{"enable_layerwise_offload": true}', 0.5), ('{"quantization": "fp8"}', 16.0)],
    ids=["layerwise_offload", "fp8"],
)
def test_a_video_with_less_memory_is_close_to_the_plain_one(
    ovi_model: Path, tmp_path: Path, options: str, levels: float
) -> None:
    import numpy as np

    plain = np.load(frames(ovi_model, "{}", tmp_path / "plain.npy")).astype(float)
    small = np.load(frames(ovi_model, options, tmp_path / "small.npy")).astype(float)
    assert small.shape == plain.shape
    assert np.abs(small - plain).mean() < levels, "mean difference in grey levels"
