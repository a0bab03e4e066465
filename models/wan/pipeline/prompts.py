"""Removal of tags from prompts, and tokenization."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from port_kit.errors import InputError
from port_kit.models.wan.components.text_encoder import MAX_TOKENS, clean_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Blocks that are removed with their content: annotations that the model was not trained with.
DROPPED_BLOCKS = ("SPEAKER_TIMESTAMPS", "AUDIO_DESCRIPTION")
_NAMES = "|".join(DROPPED_BLOCKS)
_TAG = r"\[[A-Z][A-Z0-9_]*\]"
_CLOSED_BLOCK = re.compile(rf"\[({_NAMES})_START\].*?\[\1_END\]", re.DOTALL)
_OPEN_BLOCK = re.compile(rf"\[(?:{_NAMES})\].*?(?={_TAG}|\Z)", re.DOTALL)
_ANY_TAG = re.compile(_TAG)
_BLANK_LINES = re.compile(r"\n\s*\n")


def strip_tags(prompt: str) -> str:
    """Remove the :data:`DROPPED_BLOCKS` with their content, and the markers of all other ``[TAG]`` blocks.

    A block is ``[NAME_START] .. [NAME_END]``, or ``[NAME] ..`` up to the next tag. Markers in angle brackets
    (``<img1>``, ``<sub1>``, ``<S>``) are part of the model's prompt format and are kept.
    """
    for pattern in (_CLOSED_BLOCK, _OPEN_BLOCK, _ANY_TAG):
        prompt = pattern.sub("", prompt)
    return _BLANK_LINES.sub("\n", prompt).strip()


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str, *, limit: int = MAX_TOKENS) -> list[int]:
    """Return the ids of the cleaned text with the closing ``</s>``, without padding.

    Raises:
        InputError: the text has more than ``limit`` tokens. The original truncates it silently.
    """
    ids: list[int] = tokenizer(clean_prompt(text), add_special_tokens=True)["input_ids"]
    if len(ids) > limit:
        raise InputError(
            f"the prompt has {len(ids)} tokens; at most {limit} are supported",
            code="input_too_long",
            hint="shorten the prompt",
            tokens=len(ids),
        )
    return ids
