"""Linears and attention in eight-bit floats: plain PyTorch, kernels in Triton's interpreter, and kernels on a GPU.

The interpreter needs a process of its own: Triton decides at import how it runs.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from port_kit.parallel.fp8_rows import FP8_MAX, QuantizedRows, quantize_rows, quantize_rows_torch, takes_rows

ROOT = Path(__file__).parents[2]
#: Relative error (L2) of one rounding to three bits of mantissa: half of 2**-3 at most, 0.026 for normal values.
ONE_ROUNDING = 0.03


def error(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact.double()).norm() / exact.double().norm()).item()


def values_of(rows: QuantizedRows) -> Tensor:
    return rows.values.float() * rows.scales


def test_rows_keep_their_largest_value_and_three_bits_of_the_others() -> None:
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 5)[:, None]
    x[1, 2] = 0.0
    rows = quantize_rows(x)
    assert rows.shape == x.shape and rows.scales.shape == (2, 5, 1)
    torch.testing.assert_close(rows.scales * FP8_MAX, x.abs().amax(-1, keepdim=True).clamp(min=1e-12))
    for one, exact in zip(values_of(rows)[0], x[0], strict=True):
        assert error(one, exact) < ONE_ROUNDING
    assert not values_of(rows)[1, 2].any()


def layer_of(weight: Tensor, bias: Tensor, build: Callable[..., torch.nn.Module]) -> torch.nn.Module:
    """Build a quantized linear and load its weights as a loader does."""
    from vllm_omni.quantization import build_quant_config

    from port_kit.parallel.fp8_linear import with_row_scales

    layer = build(weight.shape[1], weight.shape[0], with_row_scales(build_quant_config("fp8")), "layer")
    for name, value in {"bias": bias, "weight": weight}.items():
        parameter = layer.get_parameter(name)
        parameter.weight_loader(parameter, value)  # type: ignore[operator]
    return layer


@torch.inference_mode()
@pytest.mark.parametrize("kind", ["column", "row"])
def test_a_linear_is_the_product_of_the_rounded_values(kind: str) -> None:
    from port_kit.parallel import linear
    from port_kit.runtime.single_process import single_rank

    x, weight, bias = torch.randn(2, 7, 64), torch.randn(32, 64), torch.randn(32)
    with single_rank(torch.float32):
        layer = layer_of(weight, bias, getattr(linear, kind))
        assert takes_rows(layer)
        assert layer.weight.dtype == torch.float8_e4m3fn and layer.weight_scale.shape == (32, 1)
        rows = quantize_rows(x)
        found = layer(x)
        assert torch.equal(layer(rows), found), "tokens that are quantized before are the same"
    rounded = F.linear(values_of(rows), values_of(quantize_rows(weight)), bias)
    torch.testing.assert_close(found, rounded, rtol=1e-5, atol=1e-4)
    assert 0 < error(found, F.linear(x, weight, bias)) < 2 * ONE_ROUNDING


def test_a_scale_per_output_keeps_small_outputs() -> None:
    """One scale for the whole weight would round all outputs of the small row to zero or to few values."""
    weight = torch.randn(2, 64) * torch.tensor([[1e-6], [1e3]])
    rows = quantize_rows(weight)
    assert error(values_of(rows)[0], weight[0]) < ONE_ROUNDING


def test_parts_of_a_row_have_scales_of_their_own() -> None:
    """As under tensor parallelism: the sum of two ranks' products is as close as the product of one."""
    from port_kit.parallel.fp8_linear import multiply

    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, 64, generator=generator) for n in (9, 16))
    x[:, 50] *= 100
    halves = [
        multiply(quantize_rows(x[:, part].contiguous()), quantize_rows(weight[:, part].contiguous()), None, x.dtype)
        for part in (slice(32), slice(32, 64))
    ]
    exact = F.linear(x, weight)
    whole = multiply(quantize_rows(x), quantize_rows(weight), None, x.dtype)
    assert error(sum(halves), exact) <= 1.05 * error(whole, exact)


def test_vllms_dynamic_fp8_is_replaced_and_nothing_else() -> None:
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.model_executor.layers.quantization.fp8 import Fp8Config
    from vllm_omni.quantization import build_quant_config

    from port_kit.parallel import linear
    from port_kit.parallel.fp8_linear import RowScaledLinearMethod, with_row_scales
    from port_kit.runtime.single_process import single_rank

    with single_rank(torch.float32):
        for spec in ("fp8", {"transformer": {"method": "fp8"}, "vae": None}):
            quant = with_row_scales(build_quant_config(spec))
            layer = linear.column(32, 16, quant, "transformer.layer")
            assert isinstance(layer.quant_method, RowScaledLinearMethod)
        ignored = with_row_scales(Fp8Config(ignored_layers=["transformer.layer"]))
        layer = linear.column(32, 16, ignored, "transformer.layer")
        assert isinstance(layer.quant_method, UnquantizedLinearMethod) and not takes_rows(layer)
    serialized = Fp8Config(is_checkpoint_fp8_serialized=True)
    assert with_row_scales(serialized) is serialized
    assert with_row_scales(None) is None


def check_kernels(device: str, dtype: torch.dtype) -> None:
    """Compare the kernels that quantize with plain PyTorch.

    Args:
        device: of the tensors.
        dtype: of the results; float32 for the unrounded values, since the interpreter rounds to eight bits wrongly.
    """
    from port_kit.parallel import fp8_kernels

    fp8_kernels.DTYPE = dtype
    for rows, width in ((5, 96), (3, 3072), (2, 14336), (0, 64)):
        generator = torch.Generator(device).manual_seed(width)
        x, y = (torch.randn(rows, width, generator=generator, device=device) for _ in "xy")
        x[:1] = 0.0
        for addend, gelu in ((None, False), (y, False), (None, True)):
            values, scales = fp8_kernels.quantize_rows(x, addend, gelu=gelu)
            exact = x if addend is None else x + addend
            exact = F.gelu(exact, approximate="tanh") if gelu else exact
            check_values(values, scales, exact, quantize_rows_torch(x, addend, gelu=gelu).scales)
    for batch, tokens, heads, size in ((1, 5, 3, 8), (2, 130, 2, 24), (1, 70, 4, 128)):
        generator = torch.Generator(device).manual_seed(size)
        fused = torch.randn(batch, tokens, 3 * heads * size, generator=generator, device=device)
        x = fused[..., heads * size : 2 * heads * size].unflatten(-1, (heads, size))
        x[:, 3, 1] *= 50
        values, scales = fp8_kernels.quantize_heads(x)
        assert values.is_contiguous() and scales.shape == (batch, heads)
        check_values(values, scales[:, None, :, None], x, x.abs().amax((1, 3), keepdim=True) / FP8_MAX)


def check_values(values: Tensor, scales: Tensor, exact: Tensor, expected_scales: Tensor) -> None:
    """Check scales, and values up to their rounding."""
    torch.testing.assert_close(scales, expected_scales, rtol=1e-6, atol=0)
    assert values.shape == exact.shape
    found = values.float() * scales
    if values.dtype == torch.float32:
        torch.testing.assert_close(found, exact, rtol=2e-6, atol=1e-6)
    else:
        torch.testing.assert_close(
            found, exact, rtol=2**-4, atol=2**-9 * float(expected_scales.max()) if len(exact) else 0
        )


def test_kernels_equal_plain_pytorch_in_the_interpreter() -> None:
    triton = ROOT / "build" / "triton"
    assert triton.is_dir(), "make test puts Triton there"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(triton)}
    command = [sys.executable, "-m", "tests.parallel.test_fp8"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.gpu
def test_kernels_equal_plain_pytorch_on_a_gpu() -> None:
    check_kernels("cuda", torch.float8_e4m3fn)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("tokens", "inputs", "outputs"), [(22528, 3072, 9216), (157, 14336, 3072), (3, 96, 48), (0, 64, 32)], ids=str
)
def test_a_product_on_a_gpu_is_that_of_the_rounded_values(tokens: int, inputs: int, outputs: int) -> None:
    from port_kit.parallel.fp8_linear import multiply

    generator = torch.Generator("cuda").manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)

    x, weight, bias = draw(2, tokens, inputs), draw(outputs, inputs), draw(outputs)
    rows, columns = quantize_rows(x), quantize_rows(weight)
    found = multiply(rows, columns, bias, torch.bfloat16)
    exact = F.linear(values_of(rows).double(), values_of(columns).double(), bias.double())
    assert found.shape == exact.shape and found.dtype == torch.bfloat16
    if tokens:
        unrounded = F.linear(x, weight, bias)
        print(f"\nrelative error {error(found, exact):.2e}, of the unrounded {error(found, unrounded):.2e}")
        assert error(found, exact) < 5e-3


@pytest.mark.gpu
@pytest.mark.parametrize(("batch", "queries", "keys"), [(1, 22528, 22528), (2, 300, 512), (1, 157, 188)], ids=str)
def test_attention_on_a_gpu_is_close_to_that_of_the_given_values(batch: int, queries: int, keys: int) -> None:
    from port_kit.parallel import fp8_attention

    generator = torch.Generator("cuda").manual_seed(0)
    heads, size = (4, 128) if queries > 1000 else (24, 128)

    def draw(tokens: int, parts: int) -> Tensor:
        fused = torch.randn(
            batch, tokens, parts * heads * size, generator=generator, device="cuda", dtype=torch.bfloat16
        )
        return fused[..., : heads * size].unflatten(-1, (heads, size))

    q, k, v = draw(queries, 1), draw(keys, 2), draw(keys, 3) + 1.0
    found = fp8_attention.attend(q, k, v, size**-0.5)
    exact = F.scaled_dot_product_attention(*(x.transpose(1, 2).float() for x in (q, k, v))).transpose(1, 2)
    print(f"\nrelative error {error(found, exact):.2e}, of the deviation from 1 {error(found - 1.0, exact - 1.0):.2e}")
    assert found.shape == q.shape and found.dtype == torch.bfloat16
    assert error(found, exact) < 3e-2


@pytest.mark.gpu
@torch.inference_mode()
def test_the_engines_option_selects_it() -> None:
    from port_kit.parallel.sequence import PaddedAttention
    from port_kit.runtime.single_process import single_rank

    q, k, v = torch.randn(3, 1, 300, 4, 128, device="cuda", dtype=torch.bfloat16)
    with single_rank(torch.bfloat16, "cuda", default_device=False) as config:
        plain = PaddedAttention(4, 128, False, 128**-0.5)(q, k, v, 290)
        config.diffusion_kv_cache_dtype = "fp8"
        found = PaddedAttention(4, 128, False, 128**-0.5)(q, k, v, 290)
        declined = PaddedAttention(4, 128, False, 128**-0.5, disable_kv_quant=True)(q, k, v, 290)
    assert torch.equal(declined, plain)
    assert 0 < error(found, plain) < 0.1


if __name__ == "__main__":
    check_kernels("cpu", torch.float32)
