"""vLLM-Omni's attention in place of a module's own function, on one rank."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from port_kit.parallel.layout import Layout
from port_kit.testing.workers import run_ranks, warm_up


def _run_local(folder: Path, *operands: Tensor | float | None) -> Tensor | None:
    """Call ``OmniKernel.local`` in an engine's context, in a process of its own."""

    def work(rank: int) -> Tensor | None:
        from port_kit.autoparallel.engine_groups import engine_groups
        from port_kit.autoparallel.omni_attention import OmniKernel

        with engine_groups(Layout(), rank, folder / "rendezvous", torch.float32):
            return OmniKernel().local(*operands)  # type: ignore[arg-type]

    warm_up()
    (result,) = run_ranks(1, work)
    assert result is None or isinstance(result, Tensor)
    return result


def _operands(kv_heads: int = 4, value_size: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 5, 4, 16), (2, 7, kv_heads, 16), (2, 7, kv_heads, value_size)
    query, key, value = (torch.randn(shape, generator=generator) for shape in shapes)
    return query, key, value


def _expected(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    by_head = (x.transpose(1, 2) for x in (query, key, value))
    return scaled_dot_product_attention(*by_head, attn_mask=mask, scale=scale, enable_gqa=True).transpose(1, 2)


def test_masked_keys_of_each_row_are_left_out(tmp_path: Path) -> None:
    query, key, value = _operands()
    mask = torch.ones(2, 1, 1, 7, dtype=torch.bool)
    mask[0, ..., 3:] = False
    mask[1, ..., :2] = False
    actual = _run_local(tmp_path, query, key, value, mask, None)
    torch.testing.assert_close(actual, _expected(query, key, value, mask, None))


def test_grouped_heads_and_a_scale(tmp_path: Path) -> None:
    query, key, value = _operands(kv_heads=2)
    actual = _run_local(tmp_path, query, key, value, None, 0.5)
    torch.testing.assert_close(actual, _expected(query, key, value, None, 0.5))


def test_a_mask_per_query_is_left_to_the_module(tmp_path: Path) -> None:
    mask = torch.ones(2, 1, 5, 7, dtype=torch.bool).tril()
    assert _run_local(tmp_path, *_operands(), mask, None) is None


def test_wider_values_are_left_to_the_module(tmp_path: Path) -> None:
    assert _run_local(tmp_path, *_operands(value_size=32), None, None) is None
