"""UMT5-xxl as DreamID-Omni and Ovi use it: its tokenizer, the cleaning of prompts, the encoder.

Shapes: B prompts, T token positions, D width (4096). The reference pads prompts to 512 tokens, masks the padding and
cuts the states to the prompt's length; here prompts need no padding, since no token attends to it.
"""

from __future__ import annotations

import html
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from transformers import UMT5Config, UMT5EncoderModel
from transformers.initialization import no_init_weights

from port_kit.errors import OptionalDependencyError
from port_kit.models.wan.components.text_encoder_parallel import parallelize
from port_kit.parallel.linear import tp_rank_and_size

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

#: Tokens of a prompt that the reference reads, ``</s>`` included.
MAX_TOKENS = 512

_WHITESPACE = re.compile(r"\s+")


class TextEncoder(UMT5EncoderModel):
    """UMT5's encoder, from token ids to plain hidden states; divided over the ranks of tensor parallelism."""

    def __init__(self, config: UMT5Config) -> None:
        device, (_, ranks) = torch.get_default_device(), tp_rank_and_size()
        with torch.device("meta") if ranks > 1 else device, no_init_weights():
            super().__init__(config)  # a checkpoint fills every weight; drawing 5.7 billion numbers takes minutes
        if ranks > 1:
            parallelize(self, device)
        else:
            # Initialisation is also where transformers ties these two names of one table.
            self.encoder.embed_tokens.weight = self.shared.weight
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Encode tokens.

        Args:
            input_ids: int64 ``[B, T]``.
            attention_mask: ``[B, T]``, 1 at tokens and 0 at padding, which no token attends to.

        Returns:
            ``[B, T, D]`` in the dtype of the weights; rows at padding mean nothing.
        """
        return super().forward(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


def build_text_encoder(config: Mapping[str, Any]) -> TextEncoder:
    """Build the encoder, without meaningful weights, on the current default device and dtype.

    Args:
        config: content of ``text_encoder/config.json``, the keys of transformers' ``UMT5Config``.
    """
    return TextEncoder(UMT5Config(**{key: value for key, value in config.items() if key != "model_type"}))


def load_tokenizer(folder: Path | str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of ``google/umt5-xxl`` from a local folder; nothing is fetched."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)


def clean_prompt(text: str) -> str:
    """Clean a prompt as the reference does before it counts tokens.

    Broken encodings are mended (ftfy), HTML entities are resolved twice (``&amp;quot;`` is met in scraped captions),
    and every run of white space becomes one space.

    Raises:
        OptionalDependencyError: ftfy is not installed. Prompts without broken characters would not need it, but
            which those are is what ftfy decides.
    """
    try:
        import ftfy
    except ModuleNotFoundError as error:
        raise OptionalDependencyError(
            "cleaning prompts needs the package 'ftfy', which is not installed",
            hint="install the runtime: pip install 'port-kit[omni]'",
        ) from error
    return _WHITESPACE.sub(" ", html.unescape(html.unescape(ftfy.fix_text(text)))).strip()
