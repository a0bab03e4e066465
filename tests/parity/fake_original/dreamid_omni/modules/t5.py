"""The text encoder behind the original's factory: transformers' module, filled through the kit's rules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import UMT5Config, UMT5EncoderModel

from port_kit.models.wan.components.configs import text_encoder_config
from port_kit.models.wan.weights.component_rules import TEXT_ENCODER
from port_kit.remap import load_weights


class T5Encoder(nn.Module):
    """Ids and mask in, states out."""

    def __init__(self, sizes: Mapping[str, Any]) -> None:
        super().__init__()
        self.inner = UMT5EncoderModel(UMT5Config(**text_encoder_config(sizes)))

    def load_state_dict(self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False) -> None:
        """Take the original's names."""
        load_weights(self.inner, state_dict.items(), TEXT_ENCODER)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.inner(input_ids=ids, attention_mask=mask).last_hidden_state


def umt5_xxl(*, encoder_only: bool, return_tokenizer: bool, dtype: torch.dtype, device: str, **sizes: Any) -> T5Encoder:
    """Build the encoder alone."""
    assert encoder_only and not return_tokenizer
    return T5Encoder(sizes).to(dtype=dtype, device=device)
