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
_START_TAG = re.compile(rf"\[({_NAMES})_START\]")
_OPEN_BLOCK = re.compile(rf"\[(?:{_NAMES})\].*?(?={_TAG}|\Z)", re.DOTALL)
_ANY_TAG = re.compile(_TAG)
_BLANK_LINES = re.compile(r"\n\s*\n")


def strip_tags(prompt: str) -> str:
    """Remove the :data:`DROPPED_BLOCKS` with their content, and the markers of all other ``[TAG]`` blocks.

    A block is ``[NAME_START] .. [NAME_END]``, or ``[NAME] ..`` up to the next tag. Markers in angle brackets
    (``<img1>``, ``<sub1>``, ``<S>``) are part of the model's prompt format and are kept.
    """
    prompt = _drop_closed_blocks(prompt)
    for pattern in (_OPEN_BLOCK, _ANY_TAG):
        prompt = pattern.sub("", prompt)
    return _BLANK_LINES.sub("\n", prompt).strip()


def _drop_closed_blocks(prompt: str) -> str:
    """Remove each block up to its end tag, and read the prompt once: a pattern would, for each start without an end."""
    kept, position, searched = "", 0, 0
    unclosed: set[str] = set()
    while found := _START_TAG.search(prompt, searched):
        name, searched = found[1], found.end()
        tag = f"[{name}_END]"
        end = -1 if name in unclosed else prompt.find(tag, searched)
        if end < 0:
            unclosed.add(name)
            continue
        kept += prompt[position : found.start()]
        position = searched = end + len(tag)
    return kept + prompt[position:]


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
