"""Meaning of the words in parameter names, so that names of different code bases can be compared.

The tables hold the vocabulary of the field, not of any one model: names of query, key and value projections, norms,
feed-forward layers, embedders and the two streams of a joint block. A word that is not listed stands for itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cache, lru_cache

_WORD = re.compile(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z]+|[A-Z]+|\d+")


def _by_spelling(spellings: Mapping[str, str]) -> dict[str, str]:
    """Invert a table of meaning -> spellings."""
    return {spelling: meaning for meaning, found in spellings.items() for spelling in found.split()}


#: Complete components of names -> their words; written as words -> components.
_COMPONENTS = _by_spelling(
    {
        "shortcut": "nin_shortcut conv_shortcut skip_connection nin",
        "norm pre attn": "input_layernorm",
        "norm post ff": "post_attention_layernorm",
        "token embed": "embed_tokens word_embeddings wte tok_embeddings token_embd",
        "position embed": "wpe",
        "norm final": "ln_f norm_out",
        "ff up": "dense_h_to_4h",
        "ff down": "dense_4h_to_h",
        "gate": "wi_0 w1",
        "up": "wi_1 w3",
        "out": "wo",
        "down": "w2",
        "relative attention bias": "relative_attention_bias",
        "final": "final_layer",
        "proj out final": "proj_out",
        "attn": "attn1",
        "cross attn": "attn2 multihead_attn",
        "time embed proj": "emb_layers time_emb_proj",
        "patch embed proj": "patchify_proj",
        "img embed": "x_embedder",
        "ctx embed pooled": "y_embedder",
        "time embed": "t_embedder",
        "ff": "block_sparse_moe",
        "norm": "ln_1",
        "norm post": "ln_2",
    }
)

#: Phrases inside a component that another phrase says more plainly.
_PHRASES: tuple[tuple[str, str], ...] = (
    ("encoder_attn", "cross_attn"),
    ("encdecattention", "cross_attn"),
    ("c_fc", "fc"),
    ("c_attn", "attn_qkv"),
    ("c_proj", "proj"),
)

#: Position in a block that a word gives its module: before or after, attention or feed-forward. Unlisted words: 1.
_POSITIONS: dict[str, int] = {
    "pre": 0,
    "before": 0,
    "in": 0,
    "up": 2,
    "cross": 3,
    "post": 4,
    "after": 4,
    "out": 4,
    "ff": 5,
    "final": 6,
}

#: Words that put a module behind the attention that its name speaks of.
_AFTER_ATTENTION = {"pre", "before", "post", "after", "ff", "final"}

#: Words -> the concepts that they stand for; written as concepts -> words. The first entry: words without a meaning.
_WORDS = _by_spelling(
    {
        "": "self forward group to with mqa net module modules model weight bias w",
        "ctx": "c txt text context caption cap prompt cond condition add added y",
        "q": "query queries wq",
        "k": "key keys wk",
        "v": "value values val wv",
        "q k v": "qkv wqkv",
        "k v": "kv",
        "q k": "qk",
        "out": "o output",
        "attn": "attention att mha attentions",
        "cross attn": "xattn",
        "ff": "ffn mlp feedforward feed",
        "linear": "fc lin dense",
        "norm": "ln layernorm norms rms rmsnorm groupnorm",
        "modulation": "mod ada adaln scaleshift",
        "img": "image x",
        "video": "vid",
        "time": "t timestep timesteps",
        "time embed": "temb",
        "embed": "emb embeds embd embedder embedding embeddings",
        "embed in": "in",
        "in": "input",
        "position": "pos positional",
        "block": "blocks layers layer h resblocks",
        "resnet": "resnets res residual",
        "downsample": "downsamplers downsampler",
        "down": "downsamples",
        "upsample": "upsamplers upsampler",
        "up": "upsamples",
        "conv": "op",
        "mid": "middle",
        "expert": "experts",
        "ctx pooled": "vector",
        "final": "last",
        "token": "tok tokens vocab",
        "patch": "patchify",
    }
)

#: Words that many unrelated modules share: agreeing on them proves little.
_WEAK: dict[str, float] = {
    "proj": 0.3,
    "linear": 0.3,
    "block": 0.3,
    "embed": 0.5,
    "in": 0.5,
    "img": 0.6,
    "out": 0.7,
    "conv": 0.7,
    "final": 0.8,
}

#: Leaf names of a module's own parameters, by role. A leaf that is not here is a parameter in its own right.
LEAVES = _by_spelling(
    {
        "weight": "weight scale gamma kernel",
        "bias": "bias beta",
        **{leaf: leaf for leaf in ("running_mean", "running_var", "num_batches_tracked", "weight_g", "weight_v")},
    }
)


@cache
def words(component: str) -> tuple[str, ...]:
    """The concepts in one component of a name: ``self_attn_qkv`` -> ``(self, attn, q, k, v)``."""
    fixed = _COMPONENTS.get(component)
    if fixed is not None:
        return tuple(fixed.split())
    for phrase, plain in _PHRASES:
        component = component.replace(phrase, plain)
    found: list[str] = []
    for word in _WORD.findall(component):
        if not word.isdigit():
            found.extend(_WORDS.get(word.lower(), word.lower()).split())
    return tuple(found)


def weight_of(word: str) -> float:
    """Return the weight of ``word`` as evidence when two names share it, in (0, 1]."""
    return 0.25 if word.startswith("#") else _WEAK.get(word, 1.0)


def position(found: Iterable[str]) -> int:
    """Position among its siblings that words give a module: 0 for the first, more for later ones."""
    words = set(found)
    if "attn" in words and not words & _AFTER_ATTENTION:
        return _POSITIONS["cross"] if "cross" in words else 1
    places = [_POSITIONS.get(word, 1) for word in words]
    return 0 if 0 in places else max(places, default=1)


def secondary_rank(word: str) -> int:
    """Return how strongly a word marks its module as the special one: the second stream most, numbers not."""
    return 0 if word.startswith("#") else 3 if word == "ctx" else 1


@lru_cache(maxsize=1 << 17)
def natural_key(text: str) -> tuple[tuple[int, str], ...]:
    """Sort key under which ``norm10`` follows ``norm9``."""
    pieces = re.findall(r"\d+|\D+", text)
    return tuple((int(piece), "") if piece.isdigit() else (-1, piece) for piece in pieces)
