"""The Triton kernels of the fused steps against their plain PyTorch forms, on a GPU and in Triton's interpreter.

The interpreter runs the same kernels on a CPU, in a process of its own: Triton decides at import how it runs.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from port_kit.models.wan.transformer import fused_ops
from port_kit.models.wan.transformer.fused_ops import Residual, RMSScale, ScaleShift

#: Batch, tokens, width, rotated pairs of a head, tokens of each timestep.
SHAPES = (
    (1, 5, 96, 12, (5,)),
    (2, 7, 192, 8, (3, 4)),
    (1, 3, 768, 64, (0, 3)),
    (1, 3, 3072, 64, (3, 0)),
    (1, 40, 3072, 64, (40,)),
    (1, 3, 1536, 64, (3,)),
    (1, 3, 5120, 64, (1, 2)),
    (2, 0, 96, 12, (0,)),
)
#: Relative error (L2): one rounding instead of the two or three of plain PyTorch.
BOUNDS = {torch.float32: 2e-7, torch.bfloat16: 5e-3}
#: Of eight-bit values, with three bits of mantissa. Not rounded in the interpreter, which rounds to eight bits wrongly.
QUANTIZED_BOUNDS = {"cuda": 0.03, "cpu": 1e-6}

Pair = tuple[str, tuple[Tensor, ...], tuple[Tensor, ...]]


def pairs(dtype: torch.dtype, device: str, shape: tuple[int, int, int, int, tuple[int, ...]]) -> Iterator[Pair]:
    """Yield the results of kernels and of plain PyTorch for every form of their calls."""
    from port_kit.models.wan.transformer import kernels

    batch, tokens, width, pair_count, segments = shape
    generator = torch.Generator(device).manual_seed(tokens + width)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, device=device, dtype=dtype)

    x, y, z = (draw(batch, tokens, width) for _ in range(3))
    scale, shift, gate = draw(len(segments), batch, 6, width).unbind(2)[:3]
    modulated, learned = ScaleShift(scale, shift), ScaleShift(draw(width), draw(width))
    forms: dict[str, tuple[tuple[Tensor, ...], Tensor | None, list[ScaleShift]]] = {
        "norm": ((), None, [modulated]),
        "add": ((y,), gate, []),
        "add, two norms": ((y,), gate, [learned, learned]),
        "add without gate, norm": ((y,), None, [modulated]),
        "add two, norm": ((y, z), gate, [modulated]),
        "add two without gate, two norms": ((y, z), None, [learned, modulated]),
        "both kinds of norm": ((y,), gate, [modulated, learned]),
        "one timestep for all samples": ((y,), gate[:, :1], [ScaleShift(scale[:, :1], shift[:, :1])]),
    }
    for name, (partial_sums, weight, scale_shifts) in forms.items():
        vectors = [fused_ops._vectors(scale_shift, x) for scale_shift in scale_shifts]
        residual = Residual(partial_sums, weight) if partial_sums else None
        per_sample = None if weight is None else fused_ops._per_sample(weight, x)
        ours = kernels.add_norms(x, partial_sums, per_sample, vectors, segments[0], 1e-6, [False] * len(vectors))
        plain = fused_ops.add_norms_torch(x, residual, scale_shifts, segments, 1e-6)
        yield name, ours, plain
        for place in range(len(vectors)):
            eight_bits = [index == place for index in range(len(vectors))]
            mixed = list(kernels.add_norms(x, partial_sums, per_sample, vectors, segments[0], 1e-6, eight_bits))
            number = place + len(mixed) - len(vectors)
            rows = mixed.pop(number)
            yield f"{name}, without the quantized", tuple(mixed), plain[:number] + plain[number + 1 :]
            yield f"{name}, quantized", (rows.values.float() * rows.scales,), (plain[number].float(),)

    q, w = draw(batch, tokens, 3 * width)[..., width : 2 * width], draw(width)
    rope = torch.randn((1, tokens, pair_count, 2), generator=generator, device=device)
    plain_sums = q.float().square().sum(-1)
    squares = 2 * plain_sums
    for table, sums, keep, full_width in (
        (rope, None, True, width),
        (None, None, True, width),
        (rope, squares, False, 999),
    ):
        scale = RMSScale(w, full_width, 1e-6)
        ours = kernels.rms_rope(q, scale, sums, None if table is None else table[0], keep_unrotated=keep)
        expected = fused_ops.rms_norm_torch(q, scale, sums, table, keep_unrotated=keep)
        yield f"rms of width {full_width}, {len(expected)} results", ours, expected


def check(dtype: torch.dtype, device: str, bound: float) -> None:
    """Compare every form at every shape."""
    for shape in SHAPES:
        for name, ours, plain in pairs(dtype, device, shape):
            assert len(ours) == len(plain)
            for one, other in zip(ours, plain, strict=True):
                assert one.shape == other.shape and one.dtype == other.dtype
                if one.numel():
                    error = ((one.float() - other.float()).norm() / other.float().norm()).item()
                    limit = QUANTIZED_BOUNDS[device] if name.endswith(", quantized") else bound
                    assert error <= limit, (name, shape, error)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_kernels_equal_plain_pytorch_on_a_gpu(dtype: torch.dtype) -> None:
    check(dtype, "cuda", BOUNDS[dtype])


@pytest.mark.gpu
def test_the_epilogue_is_the_tanh_approximation_of_gelu() -> None:
    from port_kit.parallel import linear
    from port_kit.runtime.single_process import single_rank

    with single_rank(torch.bfloat16, "cuda"), torch.inference_mode():
        layer = linear.column(256, 512, None, "up")
        layer.weight.data.normal_(std=0.1)
        layer.bias.data.normal_()
        x = torch.randn(2, 70, 256, device="cuda", dtype=torch.bfloat16)
        exact = torch.nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double())
        exact = torch.nn.functional.gelu(exact, approximate="tanh")
        ours, plain = fused_ops.linear_gelu(layer, x), torch.nn.functional.gelu(layer(x), approximate="tanh")
    errors = [((value.double() - exact).norm() / exact.norm()).item() for value in (ours, plain)]
    assert errors[0] <= 1.01 * errors[1] <= 5e-3


def test_kernels_equal_plain_pytorch_in_the_interpreter() -> None:
    triton = Path(__file__).parents[2] / "build" / "triton"
    assert triton.is_dir(), "make test puts Triton there"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(triton)}
    command = [sys.executable, "-m", "tests.models.test_kernels"]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]


if __name__ == "__main__":
    from port_kit.parallel import fp8_kernels

    fp8_kernels.DTYPE = torch.float32
    check(torch.float32, "cpu", BOUNDS[torch.float32])
