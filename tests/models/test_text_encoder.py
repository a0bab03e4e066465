"""The text encoder beyond the goldens: prompt cleaning, padding, sizes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from port_kit.models.wan.components.configs import TEXT_ENCODER_CONFIG, text_encoder_config
from port_kit.models.wan.components.text_encoder import build_text_encoder, clean_prompt
from port_kit.models.wan.parity.component_cases import load_text_encoder
from tests.helpers import raises


@pytest.mark.parametrize(
    ("raw", "cleaned"),
    [
        ("", ""),
        ("  a\n\tb \u00a0 c  ", "a b c"),
        ("Tom &amp;amp; Jerry", "Tom & Jerry"),
        ("cafÃ© âœ”", "café ✔"),
        ("\u201cquoted\u201d", '"quoted"'),
    ],
)
def test_prompts_are_cleaned_as_the_reference_does(raw: str, cleaned: str) -> None:
    assert clean_prompt(raw) == cleaned


def test_padding_changes_no_token(goldens: Path) -> None:
    encoder = load_text_encoder(goldens, torch.float32)
    ids = torch.arange(3, 14)[None]
    padded = torch.cat([ids, torch.zeros(1, 53, dtype=torch.int64)], dim=1)
    mask = (torch.arange(64) < 11)[None].long()
    alone = encoder(ids, torch.ones_like(ids))
    torch.testing.assert_close(encoder(padded, mask)[:, :11], alone, atol=1e-5, rtol=0)


def test_every_layer_has_relative_positions_of_its_own() -> None:
    with torch.device("meta"):
        encoder = build_text_encoder(TEXT_ENCODER_CONFIG)
    biases = [name for name, _ in encoder.named_parameters() if "relative_attention_bias" in name]
    assert len(biases) == 24
    assert encoder.encoder.embed_tokens.weight is encoder.shared.weight


def test_sizes_of_the_reference_become_a_configuration() -> None:
    dims = {"dim": 64, "dim_attn": 96, "dim_ffn": 80, "num_heads": 6, "encoder_layers": 2, "num_buckets": 16}
    config = text_encoder_config(dims, vocab_size=99)
    assert (config["d_model"], config["d_kv"], config["d_ff"], config["vocab_size"]) == (64, 16, 80, 99)
    encoder = build_text_encoder(config)
    ids = torch.tensor([[5, 1]])
    assert encoder(ids, torch.ones_like(ids)).shape == (1, 2, 64)


def test_sizes_that_are_missing_or_not_umt5_are_refused() -> None:
    with raises("goldens_invalid", "vocab_size"):
        text_encoder_config({"dim": 64})
    with raises("goldens_invalid", "shared_pos"):
        text_encoder_config({"dim": 64, "shared_pos": True})
