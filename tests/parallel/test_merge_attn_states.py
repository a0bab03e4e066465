"""Two attentions put together: as one over all keys; and the kernel as plain PyTorch, interpreted and on a GPU.

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

from port_kit.parallel.comm.merge_attn_states import merge_attn_states, merge_attn_states_torch

ROOT = Path(__file__).parents[2]
#: Batch, tokens, heads, head dim.
SHAPES = ((1, 5, 3, 8), (2, 7, 2, 24), (1, 33, 4, 128), (1, 0, 2, 16))

#: Of the outputs that are put together, and of the result.
TYPES = (torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.float32, torch.float32)


def attention(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Return outputs ``[B, S, N, H]`` and log-sum-exps ``[B, N, S]``, straight from the definition."""
    scores = torch.einsum("bsnh,btnh->bnst", query, key)
    return torch.einsum("bnst,btnh->bsnh", scores.softmax(-1), value), scores.logsumexp(-1)


@pytest.mark.parametrize("scale", [0.1, 8.0], ids=["soft", "hard"])
def test_parts_are_one_attention(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, n, 3, 16, generator=generator).double() for n in (5, 9, 9))
    whole = attention(scale * query, key, value)
    first, second, third = (
        attention(scale * query, key[:, cut], value[:, cut]) for cut in (slice(4), slice(4, 5), slice(5, 9))
    )
    part = merge_attn_states(*first, *second, torch.float32)
    for ours, expected in zip(merge_attn_states(*part, *third, torch.float32), whole, strict=True):
        torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-6)


def check(device: str) -> None:
    """Compare the kernel with plain PyTorch, for a first and a last block, log-sum-exps of either layout."""
    from port_kit.parallel.comm.merge_attn_kernel import merge_attn_states as kernel

    for batch, tokens, heads, size in SHAPES:
        generator = torch.Generator(device).manual_seed(size)
        for given, wanted in (
            (torch.bfloat16, torch.float32),
            (torch.float32, torch.bfloat16),
            (torch.float32, torch.float32),
        ):
            a, b = (torch.randn(batch, tokens, heads, size, generator=generator, device=device).to(given) for _ in "ab")
            s = 20 * torch.randn(batch, heads, tokens, generator=generator, device=device)
            t = 20 * torch.randn(batch, tokens, heads, generator=generator, device=device).transpose(1, 2)
            bound = {"rtol": 8e-3, "atol": 1e-6} if wanted == torch.bfloat16 else {"rtol": 1e-5, "atol": 2e-6}
            for ours, plain in zip(
                kernel(a, s, b, t, wanted), merge_attn_states_torch(a, s, b, t, wanted), strict=True
            ):
                torch.testing.assert_close(ours, plain, **bound)


@pytest.mark.gpu
def test_the_kernel_is_plain_pytorch_on_a_gpu() -> None:
    check("cuda")


def test_the_kernel_is_plain_pytorch_in_the_interpreter() -> None:
    triton = ROOT / "build" / "triton"
    assert triton.is_dir(), "make test puts Triton there"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(triton)}
    command = [sys.executable, "-m", "tests.parallel.test_merge_attn_states"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


if __name__ == "__main__":
    check("cpu")
