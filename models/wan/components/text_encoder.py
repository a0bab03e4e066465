"""The UMT5-xxl text encoder of DreamID-Omni and Ovi, its tokenizer, and the cleaning of prompts.

Shapes: B prompts, T token positions, D width (4096). The original pads prompts to 512 tokens, masks the padding and
truncates the states to the length of the prompt. No token attends to padding, so prompts are not padded here.
"""

from __future__ import annotations

import html
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import UMT5Config, UMT5EncoderModel
from transformers.initialization import no_init_weights

from port_kit.errors import OptionalDependencyError
from port_kit.escape import reason_of
from port_kit.models.wan.components.text_encoder_parallel import parallelize
from port_kit.parallel.linear import tp_rank_and_size
from port_kit.pipeline.model_index import incomplete

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Maximum number of tokens of a prompt, ``</s>`` included.
MAX_TOKENS = 512

_WHITESPACE = re.compile(r"\s+")


class TextEncoder(UMT5EncoderModel):
    """UMT5's encoder, from token ids to a tensor of hidden states, with tensor parallelism."""

    def __init__(self, config: UMT5Config) -> None:
        device, (_, ranks) = torch.get_default_device(), tp_rank_and_size()
        with torch.device("meta") if ranks > 1 else device, no_init_weights():
            super().__init__(config)  # a checkpoint fills every weight; drawing 5.7 billion values takes minutes
        if ranks > 1:
            parallelize(self, device)
        else:
            # transformers ties these two names of one table during initialization, which is skipped above
            self.encoder.embed_tokens.weight = self.shared.weight
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Encode tokens.

        Args:
            input_ids: int64 ``[B, T]``.
            attention_mask: ``[B, T]``, 1 at tokens and 0 at padding, which no token attends to.

        Returns:
            ``[B, T, D]`` in the dtype of the weights; rows at padding are undefined.
        """
        return super().forward(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


def build_text_encoder(config: Mapping[str, Any]) -> TextEncoder:
    """Build the encoder with uninitialized weights on the current default device and dtype.

    Args:
        config: content of ``text_encoder/config.json``, the keys of transformers' ``UMT5Config``.
    """
    return TextEncoder(UMT5Config(**{key: value for key, value in config.items() if key != "model_type"}))


def load_tokenizer(folder: Path | str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of ``google/umt5-xxl`` from a local folder, without network access.

    Raises:
        PortKitError: ``model_incomplete``; the folder does not exist, or has no valid tokenizer.
    """
    from transformers import AutoTokenizer

    try:
        if not Path(folder).is_dir():  # the library would take it for the name of a repository
            raise FileNotFoundError("no such folder")
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # the library states no type
        raise incomplete(f"cannot read the tokenizer {folder}: {reason_of(error)}") from error


def clean_prompt(text: str) -> str:
    """Clean a prompt before tokenization, as the original implementation does.

    ftfy repairs broken encodings, HTML entities are resolved twice (scraped captions contain ``&amp;quot;``), and
    every run of whitespace becomes one space.

    Raises:
        OptionalDependencyError: ftfy is not installed.
    """
    try:
        import ftfy
    except ModuleNotFoundError as error:
        raise OptionalDependencyError(
            "cleaning prompts needs the package 'ftfy', which is not installed",
            hint="install the runtime: pip install 'port-kit[omni]'",
        ) from error
    return _WHITESPACE.sub(" ", html.unescape(html.unescape(ftfy.fix_text(text)))).strip()
