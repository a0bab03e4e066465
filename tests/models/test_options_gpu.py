"""Options on a GPU: eight-bit weights, weights that wait in host memory, CUDA graphs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from port_kit.upstream.series import installed_series

RUN = """
import json, sys
import numpy as np
from vllm_omni import Omni
from vllm_omni.inputs.data import OmniDiffusionSamplingParams

omni = Omni(model=sys.argv[1], **{"enforce_eager": True, **json.loads(sys.argv[2])})
try:
    sampling = OmniDiffusionSamplingParams(num_inference_steps=4, seed=3)
    (result,) = omni.generate({"prompt": "rain"}, sampling, py_generator=True)
    np.save(sys.argv[3], np.asarray(result.images[0]))
finally:
    omni.close()
"""


def generate(model: Path, options: str, file: Path) -> subprocess.CompletedProcess[str]:
    """Generate in a process of its own, which gives the GPU back."""
    command = [sys.executable, "-c", RUN, str(model), options, str(file)]
    return subprocess.run(command, env=os.environ, capture_output=True, text=True, timeout=600)


def frames(model: Path, options: str, file: Path) -> Path:
    """Generate without an error."""
    done = generate(model, options, file)
    assert done.returncode == 0, done.stderr[-4000:]
    return file


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("options", "levels"),
    [
        ('{"enable_cpu_offload": true}', 0.5),
        ('{"enable_layerwise_offload": true}', 0.5),
        ('{"quantization": "fp8"}', 16.0),
    ],
    ids=["cpu_offload", "layerwise_offload", "fp8"],
)
def test_a_video_with_less_memory_is_close_to_the_plain_one(
    ovi_model: Path, tmp_path: Path, options: str, levels: float
) -> None:
    import numpy as np

    plain = np.load(frames(ovi_model, "{}", tmp_path / "plain.npy")).astype(float)
    small = np.load(frames(ovi_model, options, tmp_path / "small.npy")).astype(float)
    assert small.shape == plain.shape
    assert np.abs(small - plain).mean() < levels, "mean difference in grey levels"


@pytest.mark.gpu
def test_cuda_graphs_change_no_frame(ovi_model: Path, tmp_path: Path) -> None:
    import numpy as np

    done = generate(ovi_model, '{"enforce_eager": false}', tmp_path / "graphs.npy")
    assert done.returncode == 0, done.stderr[-4000:]
    assert "captured CUDA graph" in done.stdout + done.stderr
    assert np.array_equal(np.load(tmp_path / "graphs.npy"), np.load(frames(ovi_model, "{}", tmp_path / "plain.npy")))


@pytest.mark.gpu
def test_attention_in_eight_bits_is_close_or_refused(ovi_model: Path, tmp_path: Path) -> None:
    import numpy as np

    done = generate(ovi_model, '{"diffusion_kv_cache_dtype": "fp8"}', tmp_path / "fp8.npy")
    if installed_series() == "0.30":
        assert done.returncode != 0 and "kv_cache_dtype" in done.stderr
        return
    assert done.returncode == 0, done.stderr[-4000:]
    plain = np.load(frames(ovi_model, "{}", tmp_path / "plain.npy")).astype(float)
    difference = np.abs(np.load(tmp_path / "fp8.npy").astype(float) - plain)
    assert 0 < difference.mean() < 16.0, "mean difference in grey levels; 0 if the option has no effect"
