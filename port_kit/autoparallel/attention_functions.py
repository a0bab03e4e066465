"""Attention functions that code calls by name: their arguments, and one layout for all of them.

A function is recognized by its name and its parameters, from whatever package it was imported. So a plan that was
inferred without flash-attn holds for code that calls flash-attn where it is installed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import CodeType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from port_kit.errors import ParallelError

#: Packages whose modules may hold attention functions.
PACKAGES = ("torch", "flash_attn", "flash_attn_interface", "xformers", "sageattention")
#: Values of special options that change nothing.
_NEUTRAL = (None, 0, (-1, -1), [-1, -1])


@dataclass(frozen=True)
class AttentionFunction:
    """Signature of an attention function. Names of arguments that it lacks are empty.

    Attributes:
        name: name of the function.
        parameters: positional arguments in order; the first three are queries, keys and values.
        token_dim: dimension of the tokens; 0 if the rows of a batch are packed into it.
        mask, scale, causal: names of these arguments.
        lengths: argument with the number of keys per row of the batch.
        longest: for packed rows: argument with the number of queries of the longest row.
        layout: argument that names the order of heads and tokens.
        special: arguments that no kernel of the engine supports.
        own_result: callers read the result in a form that only the function itself knows.
    """

    name: str
    parameters: tuple[str, ...]
    token_dim: int
    mask: str = ""
    scale: str = "softmax_scale"
    causal: str = "causal"
    lengths: str = ""
    longest: str = ""
    layout: str = ""
    special: tuple[str, ...] = ()
    own_result: bool = False

    def fits(self, names: Mapping[str, Any] | tuple[str, ...]) -> bool:
        """Return True if a function has these arguments."""
        return all(name in names for name in self.parameters)


_TORCH = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale")
_FLASH_2 = ("q", "k", "v", "dropout_p", "softmax_scale", "causal")
_FLASH_3 = ("q", "k", "v", "softmax_scale", "causal")
_PACKED = ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
_LOCAL = ("window_size", "softcap", "alibi_slopes", "return_attn_probs", "block_table")

SDPA = AttentionFunction("scaled_dot_product_attention", _TORCH, 2, mask="attn_mask", scale="scale", causal="is_causal")
FUNCTIONS = (
    SDPA,
    AttentionFunction("dispatch_attention_fn", _TORCH, 1, mask="attn_mask", scale="scale", causal="is_causal"),
    AttentionFunction("flash_attn_func", (*_FLASH_2, "window_size"), 1, special=("dropout_p", *_LOCAL)),
    AttentionFunction("flash_attn_func", _FLASH_3, 1, special=("qv", *_LOCAL), own_result=True),
    AttentionFunction("flash_attn_varlen_func", _PACKED, 0, longest="max_seqlen_q"),
    AttentionFunction(
        "memory_efficient_attention",
        ("query", "key", "value", "attn_bias", "p", "scale"),
        1,
        mask="attn_bias",
        scale="scale",
        causal="",
        special=("p",),
    ),
    AttentionFunction(
        "sageattn",
        ("q", "k", "v", "tensor_layout", "is_causal", "sm_scale"),
        2,
        scale="sm_scale",
        causal="is_causal",
        layout="tensor_layout",
        special=("return_lse",),
    ),
    # the helper that Wan's code, and code derived from it, puts around flash-attn
    AttentionFunction(
        "flash_attention",
        ("q", "k", "v", "q_lens", "k_lens", "dropout_p", "softmax_scale", "q_scale", "causal", "window_size"),
        1,
        lengths="k_lens",
        special=("dropout_p", "q_lens", "q_scale", "window_size"),
    ),
)
#: Names of all functions.
NAMES = frozenset(one.name for one in FUNCTIONS)


def names_in(code: CodeType) -> frozenset[str]:
    """Return the names of globals and attributes that code reads, with those of the functions within it."""
    inner = (names_in(constant) for constant in code.co_consts if isinstance(constant, CodeType))
    return frozenset(code.co_names).union(*inner)


def recognize(function: Any) -> AttentionFunction | None:
    """Return the signature of a function if it is one of :data:`FUNCTIONS`."""
    if function is scaled_dot_product_attention:
        return SDPA
    candidates = [one for one in FUNCTIONS if one.name == getattr(function, "__name__", "")]
    if not candidates or not callable(function):
        return None
    names = inspect.signature(function).parameters
    return next((one for one in candidates if one.fits(names)), None)


def is_attention_code(code: CodeType) -> bool:
    """Return True for the code of one of :data:`FUNCTIONS`."""
    names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    return any(one.name == code.co_name and one.fits(names) for one in FUNCTIONS)


class AttentionCall:
    """One call of an attention function. Tensors have the layout [B, S, N, H] for all functions.

    Args:
        signature: signature of the function.
        function: the function.
        args: positional arguments.
        options: keyword arguments.
        batch: rows of the batch; needed for packed rows only.

    Raises:
        ParallelError: ``plan_inference``; the call has more positional arguments than are known.
    """

    def __init__(
        self,
        signature: AttentionFunction,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        options: Mapping[str, Any],
        batch: int | None = None,
    ) -> None:
        if len(args) > len(signature.parameters):
            raise ParallelError(
                f"{signature.name}: expected at most {len(signature.parameters)} positional arguments, got {len(args)}",
                code="plan_inference",
                hint="pass the other arguments by name",
            )
        self.signature, self.function = signature, function
        self.given = {**dict(zip(signature.parameters, args, strict=False)), **options}
        self.heads_first = signature.token_dim == 2 and self.given.get(signature.layout) != "NHD"
        self.batch = batch if batch is not None else self._packed_rows()

    def _packed_rows(self) -> int:
        """Return the rows that are packed into the dimension of the tokens; 1 if they differ in length."""
        if not self.signature.longest:
            return 1
        tokens, longest = len(self.given[self.signature.parameters[0]]), self.given[self.signature.longest]
        return tokens // int(longest) if tokens % int(longest) == 0 else 1

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values."""
        query, key, value = (self._to_common(self.given[name]) for name in self.signature.parameters[:3])
        return query, key, value

    def _to_common(self, x: Tensor) -> Tensor:
        if self.signature.longest:
            return x.unflatten(0, (self.batch, -1))
        return x.transpose(1, 2) if self.heads_first else x

    def _to_own(self, x: Tensor) -> Tensor:
        if self.signature.longest:
            return x.flatten(0, 1)
        return x.transpose(1, 2) if self.heads_first else x

    @property
    def mask(self) -> Any:
        """The mask argument, or None; [B, keys] becomes [B, 1, 1, keys] if the function reads it so."""
        mask: Any = self.given.get(self.signature.mask)
        if torch.is_tensor(mask) and mask.dim() == 2 and self.signature.name == "dispatch_attention_fn":
            return mask[:, None, None]  # torch reads two dimensions as [queries, keys]
        return mask

    @property
    def scale(self) -> float | None:
        """The factor of the scores, or None for the default."""
        return self.given.get(self.signature.scale)

    @property
    def is_causal(self) -> bool:
        """True if queries attend to earlier keys only."""
        return bool(self.given.get(self.signature.causal))

    @property
    def is_regular(self) -> bool:
        """True if another kernel can compute the result from queries, keys, values, mask and scale."""
        signature = self.signature
        special = [self.given.get(name) for name in signature.special]
        mask = self.mask
        return (
            not (self.is_causal or signature.longest or signature.own_result)
            and (mask is None or torch.is_tensor(mask))
            and all(not torch.is_tensor(value) and value in _NEUTRAL for value in special)
        )

    def mask_of_lengths(self, keys: int) -> Tensor | None:
        """Return the mask [B, 1, 1, keys] that a number of keys per row stands for; None if all keys are valid."""
        lengths = self.given.get(self.signature.lengths)
        if lengths is None or bool((lengths >= keys).all()):
            return None
        lengths = lengths.to(self.given[self.signature.parameters[0]].device)
        return (torch.arange(keys, device=lengths.device) < lengths[:, None])[:, None, None]

    def run_unchanged(self) -> Any:
        """Call the function as it was called."""
        return self.function(**self.given)

    def run(self, query: Tensor, key: Tensor, value: Tensor, mask: Any) -> Any:
        """Call the function with other tensors and another mask; return what it returns."""
        names = self.signature.parameters
        tensors = {name: self._to_own(x) for name, x in zip(names, (query, key, value), strict=False)}
        masks = {self.signature.mask: mask} if self.signature.mask else {}
        return self.function(**{**self.given, **tensors, **masks})

    def result(self, returned: Any) -> Tensor:
        """Return the attention output [B, S, N, H] of what the function returned."""
        return self._to_common(returned[0] if isinstance(returned, tuple) else returned)

    def wrap(self, out: Tensor, returned: Any = None) -> Any:
        """Return an attention output in the form of what the function returned; other results are dropped."""
        own = self._to_own(out)
        return (own, *(None for _ in returned[1:])) if isinstance(returned, tuple) else own
