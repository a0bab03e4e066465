"""Cache-DiT: with a threshold of nothing it changes nothing, with a high one fewer blocks are computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from port_kit.parallel.verify import tiny_request
from port_kit.registry import list_ports
from port_kit.testing.workers import Request, run_workers
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from retouch import PORT
from retouch.model.transformer import RetouchTransformer

STEPS = 8
(BLOCK,) = RetouchTransformer._repeated_blocks
_computed = 0


def watch() -> None:
    """Count the blocks that this process computes."""

    def count(module: nn.Module, _given: Any, _output: Any) -> None:
        global _computed
        _computed += type(module).__name__ == BLOCK

    register_module_forward_hook(count)


def run(model: Path, threshold: float | None) -> tuple[torch.Tensor, int]:
    """Return the output, and how many blocks were computed for them."""
    config: dict[str, Any] = {}
    if threshold is not None:
        cache = {"Fn_compute_blocks": 1, "max_warmup_steps": 1, "residual_diff_threshold": threshold}
        config = {"cache_backend": "cache_dit", "cache_config": cache}
    tiny = tiny_request(PORT)
    request = Request(tiny.prompt, {**tiny.sampling, "num_inference_steps": STEPS})
    (result,) = run_workers(model, [request], config=config, setup=watch, probe=lambda _pipeline: _computed)
    return result.outputs[0]["image"], result.probe


def test_a_cache_saves_blocks_and_only_where_it_may(model: Path) -> None:
    list_ports.cache_clear()
    plain, all_blocks = run(model, None)
    exact, as_many = run(model, 0.0)
    _, fewer = run(model, 100.0)
    assert (plain.short() - exact.short()).abs().max() <= 1
    assert as_many == all_blocks
    assert fewer < all_blocks
