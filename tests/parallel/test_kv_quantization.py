"""Quantized attention (``diffusion_kv_cache_dtype``): every attention layer gets the dtype, or declines it openly."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from vllm_omni.diffusion.attention.backends.abstract import AttentionMetadata

from port_kit.models.wan.transformer.config import TRANSFORMER_CONFIG
from port_kit.models.wan.transformer.model import build_transformer
from port_kit.parallel.sequence import PaddedAttention
from port_kit.runtime.attention import CpuSDPAImpl
from port_kit.runtime.single_process import single_rank

TINY = {"num_layers": 2, "dim": 48, "num_heads": 4, "ffn_dim": 64, "text_dim": 16}


@pytest.fixture
def dtypes(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """Give the CPU's attention FP8 support in name; return the list of the dtypes that it is called with."""
    seen: list[str | None] = []
    original = CpuSDPAImpl.forward

    def forward(
        self: CpuSDPAImpl, query: Tensor, key: Tensor, value: Tensor, attn_metadata: AttentionMetadata | None = None
    ) -> Tensor:
        seen.append(attn_metadata.extra.get("kv_cache_dtype") if attn_metadata is not None else None)
        return original(self, query, key, value, None)

    monkeypatch.setattr(CpuSDPAImpl, "forward", forward)
    monkeypatch.setattr(CpuSDPAImpl, "supports_kv_cache_dtype", lambda *_: True)
    return seen


@pytest.mark.parametrize(("gather", "expected"), [(None, "fp8"), ("kv", "fp8"), ("q", "float")])
@pytest.mark.parametrize("length", [None, 3])
def test_layers_get_the_dtype_unless_they_gather_queries(
    gather: Literal["kv", "q"] | None, expected: str, length: int | None, dtypes: list[str | None]
) -> None:
    with single_rank(torch.float32) as config:
        config.diffusion_kv_cache_dtype = "fp8"
        layer = PaddedAttention(2, 8, False, 8**-0.5, gather=gather)
        result = layer(*torch.ones(3, 1, 4, 2, 8), length)
    assert result.shape == (1, 4, 2, 8) and dtypes == [expected]


@torch.inference_mode()
def test_a_block_quantizes_self_attention_of_the_video_only(dtypes: list[str | None]) -> None:
    towers = {name: {**TRANSFORMER_CONFIG[name], **TINY} for name in ("video", "audio")}
    with single_rank(torch.float32) as config:
        config.diffusion_kv_cache_dtype = "fp8"
        model = build_transformer({**TRANSFORMER_CONFIG, **towers})
        for parameter in model.parameters():
            parameter.fill_(0.01)
        video, audio = model.config.video.in_channels, model.config.audio.in_channels
        inputs: dict[str, Any] = {"video": torch.ones(1, video, 1, 2, 2), "audio": torch.ones(1, 3, audio)}
        inputs |= {"timestep": torch.tensor(1), "video_text": torch.ones(1, 2, 16), "audio_text": torch.ones(1, 2, 16)}
        model(**inputs)
    blocks = TINY["num_layers"]
    assert (dtypes.count("fp8"), dtypes.count("float"), len(dtypes)) == (blocks, 5 * blocks, 6 * blocks)


def test_a_backend_without_support_is_an_error_and_not_ignored() -> None:
    with single_rank(torch.float32) as config:
        config.diffusion_kv_cache_dtype = "fp8"
        with pytest.raises(ValueError, match="does not support kv_cache_dtype='fp8'"):
            PaddedAttention(2, 8, False, 8**-0.5)
