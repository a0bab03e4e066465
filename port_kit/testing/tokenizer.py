"""A tiny tokenizer in the files of a T5 one: seeded, complete over printable ASCII, loadable by transformers."""

from __future__ import annotations

import json
import random
import string
from collections.abc import Sequence
from pathlib import Path

from port_kit.errors import OptionalDependencyError

#: Ids 0, 1 and 2, as T5's and UMT5's tokenizers number them.
SPECIAL_TOKENS = ("<pad>", "</s>", "<unk>")

_CONSONANTS, _VOWELS = "bcdfghklmnprstvw", "aeiou"


def write_tokenizer(folder: Path, *, size: int = 512, seed: int = 0, words: Sequence[str] = ()) -> list[Path]:
    """Write a Unigram tokenizer and return its files.

    Every printable ASCII character is a piece, so that no such text has unknown tokens; the rest are syllables.

    Args:
        folder: must exist.
        size: entries of the vocabulary; the text encoder needs as many rows.
        seed: of the syllables and of all scores.
        words: that are one piece each.

    Raises:
        OptionalDependencyError: the package ``tokenizers`` is not installed.
    """
    try:
        from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    except ModuleNotFoundError as error:
        raise OptionalDependencyError(
            "writing a tokenizer needs the package 'tokenizers', which is not installed",
            hint="install the runtime: pip install 'port-kit[omni]'",
        ) from error
    tokenizer = Tokenizer(models.Unigram(_vocabulary(size, seed, words), unk_id=2, byte_fallback=False))
    tokenizer.normalizer = normalizers.Replace("\n", " ")
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    path = folder / "tokenizer.json"
    tokenizer.save(str(path))
    return [path, *_write_settings(folder)]


def _vocabulary(size: int, seed: int, words: Sequence[str]) -> list[tuple[str, float]]:
    """Return (piece, log-probability): special tokens, characters, the words, then syllables up to ``size``."""
    rng = random.Random(seed)
    characters = ["▁", *(c for c in string.printable if not c.isspace())]
    syllables = [mark + c + v for mark in ("▁", "") for c in _CONSONANTS for v in _VOWELS]
    rng.shuffle(syllables)
    pieces = [(piece, -9 - rng.random()) for piece in characters]
    pieces += [(mark + word, -3.0) for word in words if len(word) > 1 for mark in ("▁", "")]
    taken = {piece for piece, _ in pieces}
    room = size - len(SPECIAL_TOKENS) - len(pieces)
    syllables = [piece for piece in syllables if piece not in taken]
    pieces += [(piece, -6 - rng.random()) for piece in syllables[: max(0, room)]]
    return [(token, 0.0) for token in SPECIAL_TOKENS] + pieces


def _write_settings(folder: Path) -> list[Path]:
    tokens = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    settings = {
        "tokenizer_class": "T5TokenizerFast",
        "extra_ids": 0,
        "additional_special_tokens": [],
        "clean_up_tokenization_spaces": False,
        **tokens,
    }
    files = {"tokenizer_config.json": settings, "special_tokens_map.json": tokens}
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=1), encoding="utf-8")
    return [folder / name for name in files]
