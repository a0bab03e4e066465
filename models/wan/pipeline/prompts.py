"""Prompts: what is taken out of them, and how they become token ids."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from port_kit.errors import InputError
from port_kit.models.wan.components.text_encoder import MAX_TOKENS, clean_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Blocks that go with all they hold: annotations for people and captioners, never shown to the model.
DROPPED_BLOCKS = ("SPEAKER_TIMESTAMPS", "AUDIO_DESCRIPTION")
_NAMES = "|".join(DROPPED_BLOCKS)
_TAG = r"\[[A-Z][A-Z0-9_]*\]"
_CLOSED_BLOCK = re.compile(rf"\[({_NAMES})_START\].*?\[\1_END\]", re.DOTALL)
_OPEN_BLOCK = re.compile(rf"\[(?:{_NAMES})\].*?(?={_TAG}|\Z)", re.DOTALL)
_ANY_TAG = re.compile(_TAG)
_BLANK_LINES = re.compile(r"\n\s*\n")


def strip_tags(prompt: str) -> str:
    """Remove the :data:`DROPPED_BLOCKS` with their content, then the marker of every other ``[TAG]``.

    A block is ``[NAME_START] .. [NAME_END]``, or ``[NAME] ..`` up to the next tag. Markers in angle brackets
    (``<img1>``, ``<sub1>``, ``<S>``) belong to the model's language and stay.
    """
    for pattern in (_CLOSED_BLOCK, _OPEN_BLOCK, _ANY_TAG):
        prompt = pattern.sub("", prompt)
    return _BLANK_LINES.sub("\n", prompt).strip()


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str, *, limit: int = MAX_TOKENS) -> list[int]:
    """Return the ids of the cleaned text with the closing ``</s>``, without padding.

    Raises:
        InputError: the text takes more than ``limit`` tokens. The reference cuts it there without a word.
    """
    ids: list[int] = tokenizer(clean_prompt(text), add_special_tokens=True)["input_ids"]
    if len(ids) > limit:
        raise InputError(
            f"the prompt takes {len(ids)} tokens; the text encoder reads {limit}",
            code="input_too_long",
            hint="shorten the prompt",
            tokens=len(ids),
        )
    return ids
