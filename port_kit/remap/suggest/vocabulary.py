"""What the words in parameter names mean, so that two code bases that name one thing differently can be compared.

The tables hold the vocabulary of the field, not of any one model: how query, key and value projections, norms,
feed-forward layers, embedders and the two streams of a joint block are called. A word that is not listed stands
for itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache, lru_cache

_WORD = re.compile(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z]+|[A-Z]+|\d+")

#: Spellings of one component that mean the same as a list of plain words. Matched against a whole component.
_COMPONENTS: dict[str, str] = {
    "nin_shortcut": "shortcut",
    "conv_shortcut": "shortcut",
    "skip_connection": "shortcut",
    "input_layernorm": "norm pre attn",
    "post_attention_layernorm": "norm post ff",
    "embed_tokens": "token embed",
    "word_embeddings": "token embed",
    "wte": "token embed",
    "wpe": "position embed",
    "tok_embeddings": "token embed",
    "token_embd": "token embed",
    "ln_f": "norm final",
    "dense_h_to_4h": "ff up",
    "dense_4h_to_h": "ff down",
    "wi_0": "gate",
    "wi_1": "up",
    "wo": "out",
    "w1": "gate",
    "w2": "down",
    "w3": "up",
    "nin": "shortcut",
    "relative_attention_bias": "relative attention bias",
    "final_layer": "final",
    "norm_out": "norm final",
    "proj_out": "proj out final",
    "attn1": "attn",
    "attn2": "cross attn",
    "multihead_attn": "cross attn",
    "emb_layers": "time embed proj",
    "time_emb_proj": "time embed proj",
    "patchify_proj": "patch embed proj",
    "x_embedder": "img embed",
    "y_embedder": "ctx embed pooled",
    "t_embedder": "time embed",
    "block_sparse_moe": "ff",
    "ln_1": "norm",
    "ln_2": "norm post",
}

#: Phrases inside a component that another phrase says more plainly.
_PHRASES: tuple[tuple[str, str], ...] = (
    ("encoder_attn", "cross_attn"),
    ("encdecattention", "cross_attn"),
    ("c_fc", "fc"),
    ("c_attn", "attn_qkv"),
    ("c_proj", "proj"),
)

#: Where in a block a word puts its module: before or after, attention or feed-forward. Unlisted words say 1.
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

#: Words -> the concepts they stand for. An empty value: the word says nothing.
_WORDS: dict[str, str] = {
    "self": "",
    "c": "ctx",
    "query": "q",
    "queries": "q",
    "wq": "q",
    "key": "k",
    "keys": "k",
    "wk": "k",
    "value": "v",
    "values": "v",
    "val": "v",
    "wv": "v",
    "qkv": "q k v",
    "wqkv": "q k v",
    "kv": "k v",
    "qk": "q k",
    "o": "out",
    "output": "out",
    "attention": "attn",
    "att": "attn",
    "xattn": "cross attn",
    "mha": "attn",
    "ff": "ff",
    "ffn": "ff",
    "mlp": "ff",
    "feedforward": "ff",
    "feed": "ff",
    "forward": "",
    "fc": "linear",
    "lin": "linear",
    "dense": "linear",
    "ln": "norm",
    "layernorm": "norm",
    "norms": "norm",
    "rms": "norm",
    "rmsnorm": "norm",
    "groupnorm": "norm",
    "group": "",
    "mod": "modulation",
    "ada": "modulation",
    "adaln": "modulation",
    "scaleshift": "modulation",
    "txt": "ctx",
    "text": "ctx",
    "context": "ctx",
    "caption": "ctx",
    "cap": "ctx",
    "prompt": "ctx",
    "cond": "ctx",
    "condition": "ctx",
    "add": "ctx",
    "added": "ctx",
    "y": "ctx",
    "image": "img",
    "x": "img",
    "vid": "video",
    "t": "time",
    "timestep": "time",
    "timesteps": "time",
    "temb": "time embed",
    "emb": "embed",
    "embeds": "embed",
    "embd": "embed",
    "embedder": "embed",
    "embedding": "embed",
    "embeddings": "embed",
    "in": "embed in",
    "input": "in",
    "pos": "position",
    "positional": "position",
    "blocks": "block",
    "layers": "block",
    "layer": "block",
    "h": "block",
    "resblocks": "block",
    "resnets": "resnet",
    "res": "resnet",
    "residual": "resnet",
    "attentions": "attn",
    "downsample": "downsample",
    "downsamplers": "downsample",
    "downsampler": "downsample",
    "downsamples": "down",
    "upsample": "upsample",
    "upsamplers": "upsample",
    "upsampler": "upsample",
    "upsamples": "up",
    "op": "conv",
    "middle": "mid",
    "expert": "expert",
    "experts": "expert",
    "vector": "ctx pooled",
    "head": "head",
    "last": "final",
    "tok": "token",
    "tokens": "token",
    "vocab": "token",
    "patchify": "patch",
    "refiner": "refiner",
    "to": "",
    "with": "",
    "mqa": "",
    "net": "",
    "module": "",
    "modules": "",
    "model": "",
    "weight": "",
    "bias": "",
    "w": "",
}

#: Words that many unrelated modules share: agreeing on them proves little.
_WEAK: dict[str, float] = {
    "proj": 0.3,
    "linear": 0.3,
    "block": 0.3,
    "embed": 0.5,
    "in": 0.5,
    "out": 0.7,
    "img": 0.6,
    "conv": 0.7,
    "final": 0.8,
}

#: Leaf names of a module's own parameters, by role. A leaf that is not here is a parameter in its own right.
LEAVES: dict[str, str] = {
    "weight": "weight",
    "scale": "weight",
    "gamma": "weight",
    "kernel": "weight",
    "bias": "bias",
    "beta": "bias",
    "running_mean": "running_mean",
    "running_var": "running_var",
    "num_batches_tracked": "num_batches_tracked",
    "weight_g": "weight_g",
    "weight_v": "weight_v",
}


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
    """How much it says when two names share ``word``, in (0, 1]."""
    return 0.25 if word.startswith("#") else _WEAK.get(word, 1.0)


def position(found: Iterable[str]) -> int:
    """Where words put a module among its siblings: 0 for the first, more for later ones."""
    words = set(found)
    if "attn" in words and not words & _AFTER_ATTENTION:
        return _POSITIONS["cross"] if "cross" in words else 1
    places = [_POSITIONS.get(word, 1) for word in words]
    return 0 if 0 in places else max(places, default=1)


def markedness(word: str) -> int:
    """How much a word marks its module as the special one among siblings: the second stream most, numbers not."""
    return 0 if word.startswith("#") else 3 if word == "ctx" else 1


@lru_cache(maxsize=1 << 17)
def natural_key(text: str) -> tuple[tuple[int, str], ...]:
    """Sort key under which ``norm10`` follows ``norm9``."""
    pieces = re.findall(r"\d+|\D+", text)
    return tuple((int(piece), "") if piece.isdigit() else (-1, piece) for piece in pieces)
