"""Norms over split widths: the kernels as plain PyTorch, interpreted and on a GPU.

The interpreter needs a process of its own: Triton decides at import how it runs.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
#: Rows and width.
SHAPES = ((5, 24), (33, 128), (0, 16), (3, 2560))


def _expected(x: Tensor, sums: Tensor, weight: Tensor | None, width: int, eps: float) -> Tensor:
    normed = x.double() / (sums.double() / width + eps).sqrt().unsqueeze(-1)
    return normed if weight is None else normed * weight.double()


def check(dtype: torch.dtype, device: str) -> None:
    """Compare the kernels with float64, for contiguous rows and for rows of a wider tensor."""
    from port_kit.parallel import norm_kernels

    bound = {"rtol": 8e-3, "atol": 1e-6} if dtype is torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}
    for rows, width in SHAPES:
        generator = torch.Generator(device).manual_seed(width)
        wide = torch.randn(rows, 3 * width, generator=generator, device=device).to(dtype)
        weight = torch.randn(width, generator=generator, device=device).to(dtype)
        for x in (wide[:, width : 2 * width], wide[:, :width].contiguous()):
            sums = norm_kernels.square_sums(x)
            torch.testing.assert_close(sums, x.double().square().sum(-1).float(), rtol=1e-5, atol=1e-6)
            for factors in (weight, None):
                ours = norm_kernels.rms_norm(x, 2 * sums, factors, 2 * width, 1e-3)
                assert ours.dtype is dtype
                torch.testing.assert_close(
                    ours.double(), _expected(x, 2 * sums, factors, 2 * width, 1e-3), check_dtype=False, **bound
                )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_kernels_on_a_gpu(dtype: torch.dtype) -> None:
    check(dtype, "cuda")


def test_the_kernels_in_the_interpreter() -> None:
    triton = ROOT / "build" / "triton"
    assert triton.is_dir(), "make test puts Triton there"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(triton)}
    command = [sys.executable, "-m", "tests.parallel.test_norm"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("shape", [(2, 5, 12), (7, 12)], ids=str)
def test_plain_pytorch(shape: tuple[int, ...]) -> None:
    from port_kit.parallel.norm import rms_norm, square_sums

    x, weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)), torch.linspace(0.5, 2, 12)
    sums = square_sums(x)
    assert sums.shape == shape[:-1]
    torch.testing.assert_close(
        rms_norm(x, sums, weight, 12, 1e-6), torch.nn.functional.rms_norm(x, (12,), weight, 1e-6)
    )


if __name__ == "__main__":
    check(torch.float32, "cpu")
