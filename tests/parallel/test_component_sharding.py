"""Sharding of other components: the text encoder under tensor parallelism, the decoding of a video."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from port_kit.parallel.memory import local_bytes
from port_kit.testing.workers import RankResult, run_workers
from tests.helpers import slow

#: Tokens of a prompt, ``</s>`` last.
TOKENS = [5, 17, 60, 3, 99, 42, 8, 1]


def divided(model: Path, parallel: dict[str, Any], probe: Any) -> list[RankResult]:
    """Load the model on several ranks and ask each."""

    def together(pipeline: nn.Module) -> Any:
        answer = probe(pipeline)
        torch.distributed.barrier()  # a rank that leaves early takes the others' rendezvous with it
        return answer

    return run_workers(model, [], config={"parallel_config": parallel}, probe=together)


def encode(pipeline: nn.Module) -> tuple[Tensor, int]:
    """A prompt's states, and the bytes of the encoder on this rank."""
    return pipeline.encode_prompt(TOKENS), local_bytes(pipeline.text_encoder)


def decode(pipeline: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    """An image's latents, a video decoded completely or in parts, and the same video decoded in tiles."""
    vae = pipeline.vae
    random = torch.Generator().manual_seed(0)
    image = torch.rand(1, 3, 1, 64, 96, generator=random) * 2 - 1
    latents = torch.randn(1, 48, 2, 5, 6, generator=random)
    vae.enable_tiling(32, 32, 16, 16)
    tiling = getattr(vae, "distributed_executor", None) is not None and vae.distributed_executor.parallel_size > 1
    vae.use_tiling = tiling
    encoded, decoded = vae.encode(image), vae.decode(latents)
    vae.use_tiling = True
    tiled = decoded if tiling else vae.decode(latents)
    return encoded, decoded, tiled


@pytest.fixture(scope="module")
def alone(dreamid_model: Path) -> tuple[tuple[Tensor, int], tuple[Tensor, Tensor, Tensor]]:
    """The result of one rank."""
    return divided(dreamid_model, {}, lambda pipeline: (encode(pipeline), decode(pipeline)))[0].probe


def test_the_text_encoder_is_divided_and_its_states_are_the_same(dreamid_model: Path, alone: Any) -> None:
    (states, whole), _ = alone
    for result in divided(dreamid_model, {"tensor_parallel_size": 2}, encode):
        mine, held = result.probe
        torch.testing.assert_close(mine, states, rtol=0, atol=5e-6)
        assert held <= 0.53 * whole


@pytest.mark.parametrize("mode", ["spatial_shard_height", "tile", *slow("spatial_shard_width")])
def test_two_decoders_share_a_clip(mode: str, dreamid_model: Path, alone: Any) -> None:
    _, (encoded, decoded, tiled) = alone
    parallel = {"cfg_parallel_size": 2, "vae_patch_parallel_size": 2, "vae_parallel_mode": mode}
    first, second = (result.probe for result in divided(dreamid_model, parallel, decode))
    torch.testing.assert_close(first[0], encoded, rtol=0, atol=0)
    expected = tiled if mode == "tile" else decoded
    torch.testing.assert_close(first[1], expected, rtol=0, atol=0 if mode == "tile" else 5e-6)
    assert second[1].shape == (1, 3, 0, *expected.shape[3:])
