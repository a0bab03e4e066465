"""Stand-ins for attention packages that need a GPU, to infer and prove plans on a CPU.

They compute the same with torch. :func:`attention_packages` is for code that cannot be imported without a package.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import handle_torch_function, has_torch_function

from port_kit.errors import ParallelError


def _visible(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Let modes of torch see calls of a function, as they see those of torch's functions."""

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Tensor:
        tensors = tuple(x for x in (*args, *options.values()) if isinstance(x, Tensor))
        if has_torch_function(tensors):
            return handle_torch_function(call, tensors, *args, **options)
        return function(*args, **options)

    return call


def _attend(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, scale: float | None, causal: bool) -> Tensor:
    """Attend with tensors [B, S, N, H]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.transpose(1, 2)


@_visible
def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    """Attend as flash-attn 2 does, to all keys."""
    return _attend(q, k, v, mask=None, scale=softmax_scale, causal=causal)


def _flash_attn_3() -> Callable[..., Tensor]:
    @_visible
    def flash_attn_func(
        q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None = None, causal: bool = False
    ) -> Tensor:
        return _attend(q, k, v, mask=None, scale=softmax_scale, causal=causal)

    return flash_attn_func


@_visible
def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    **_options: Any,
) -> Tensor:
    """Attend within each of several packed sequences, as flash-attn does."""
    out = torch.zeros(*q.shape[:-1], v.shape[-1], dtype=q.dtype)
    bounds = [list(zip(c.tolist(), c.tolist()[1:], strict=False)) for c in (cu_seqlens_q, cu_seqlens_k)]
    for (start, stop), (key_start, key_stop) in zip(*bounds, strict=True):
        if stop > start and key_stop > key_start:
            own = q[None, start:stop], k[None, key_start:key_stop], v[None, key_start:key_stop]
            out[start:stop] = _attend(*own, mask=None, scale=softmax_scale, causal=causal)[0]
    return out


@_visible
def memory_efficient_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | None = None,
    p: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """Attend as xformers does, with a tensor as the bias."""
    return _attend(query, key, value, mask=attn_bias, scale=scale, causal=False)


@_visible
def sageattn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensor_layout: str = "HND",
    is_causal: bool = False,
    sm_scale: float | None = None,
    **_options: Any,
) -> Tensor:
    """Attend as SageAttention does, without its quantization."""
    if tensor_layout == "NHD":
        return _attend(q, k, v, mask=None, scale=sm_scale, causal=is_causal)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return _attend(q, k, v, mask=None, scale=sm_scale, causal=is_causal).transpose(1, 2)


@_visible
def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_lens: Tensor | None = None,
    k_lens: Tensor | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    q_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    **_options: Any,
) -> Tensor:
    """Attend to the first ``k_lens`` keys of each row, as the helper of Wan's code does on a GPU."""
    mask = None
    if k_lens is not None:
        mask = (torch.arange(k.shape[1]) < k_lens[:, None])[:, None, None]
    q = q if q_scale is None else q * q_scale
    return _attend(q, k, v, mask=mask, scale=softmax_scale, causal=causal).to(q.dtype)


_FLASH_2 = {"flash_attn_func": flash_attn_func, "flash_attn_varlen_func": flash_attn_varlen_func}
_FLASH_3 = {"flash_attn_func": _flash_attn_3(), "flash_attn_varlen_func": flash_attn_varlen_func}
#: Contents of the modules of each package.
_MODULES: dict[str, dict[str, dict[str, Any]]] = {
    "flash_attn": {"flash_attn": _FLASH_2, "flash_attn.flash_attn_interface": _FLASH_2},
    "flash_attn_interface": {"flash_attn_interface": _FLASH_3},
    "xformers": {"xformers": {}, "xformers.ops": {"memory_efficient_attention": memory_efficient_attention}},
    "sageattention": {"sageattention": {"sageattn": sageattn}},
}
#: Packages that have a stand-in.
STAND_INS = tuple(_MODULES)


@contextmanager
def attention_packages(*names: str) -> Iterator[None]:
    """Let code import attention packages; those that are not installed are replaced by stand-ins meanwhile.

    Args:
        names: packages, of :data:`STAND_INS`.

    Raises:
        ParallelError: ``plan_subject``; a package has no stand-in.
    """
    unknown = sorted(set(names) - set(STAND_INS))
    if unknown:
        raise ParallelError(
            f"no stand-in for {', '.join(unknown)}; there are {', '.join(STAND_INS)}",
            code="plan_subject",
            hint="install the package, or put a module with its functions into sys.modules",
        )
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    modules = {path: _module(path, content) for name in missing for path, content in _MODULES[name].items()}
    for path, module in modules.items():
        parent, _, leaf = path.rpartition(".")
        if parent:
            setattr(modules[parent], leaf, module)
    sys.modules.update(modules)
    try:
        yield
    finally:
        for path in modules:
            sys.modules.pop(path, None)


def _module(path: str, content: dict[str, Any]) -> ModuleType:
    module = ModuleType(path)
    module.__dict__.update(content, __spec__=ModuleSpec(path, None), __version__="0")
    module.__path__ = []
    return module
