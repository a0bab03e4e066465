"""The choice of vLLM-Omni's FlashAttention kernel."""

from __future__ import annotations

import pytest
import torch
from vllm_omni.diffusion.attention.backends.ring import ring_kernels as kernels
from vllm_omni.diffusion.attention.parallel import ring

from port_kit.upstream.ring_kernels import CHOICES, flash_attention, flash_kernel
from port_kit.upstream.series import installed_series

CHOICE = CHOICES[installed_series()]
CPU = torch.device("cpu")


def allow(monkeypatch: pytest.MonkeyPatch, *usable: str) -> None:
    for name, _ in CHOICE:
        monkeypatch.setattr(ring, name, lambda device, answer=name in usable: answer)


def test_no_kernel_runs_on_a_cpu() -> None:
    assert flash_kernel(CPU) is None


@pytest.mark.parametrize(("usable", "kernel"), CHOICE)
def test_the_kernel_that_supports_the_device_is_chosen(
    usable: str, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    allow(monkeypatch, usable)
    assert flash_kernel(CPU) is getattr(kernels, kernel)


def test_upstreams_preference_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    allow(monkeypatch, *(usable for usable, _ in CHOICE))
    assert flash_kernel(CPU) is getattr(kernels, CHOICE[0][1])


def test_a_padded_log_sum_exp_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    allow(monkeypatch, CHOICE[0][0])
    lse = torch.arange(8.0).reshape(1, 1, 8)
    monkeypatch.setattr(kernels, CHOICE[0][1], lambda q, k, v, **options: (q, lse))
    x = torch.zeros(1, 5, 1, 16)
    out, found = flash_attention(x, x, x, 1.0)
    assert out is x and torch.equal(found, lse[..., :5])
