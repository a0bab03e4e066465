"""Attention calls of a plan: the functions that make them are rebound per module to exchange tokens and heads.

A function is copied with an overlay of its globals in which the attention function is replaced. Nothing is changed
outside of the module that owns the call.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from types import FunctionType, MethodType, ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from port_kit.autoparallel.plan import AttentionSite
from port_kit.autoparallel.tokens import WHOLE, Tokens
from port_kit.errors import ParallelError

#: Names of the arguments after query, key and value, in both attention functions.
_POSITIONAL = ("attn_mask", "dropout_p", "is_causal", "scale")


class Kernel(Protocol):
    """Attention of an engine. Tensors are [B, S, N, H]; both functions return None if they do not support the operands.

    Attributes:
        kind: name of the exchange, for counts.
    """

    kind: str

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scale: float | None,
        site: AttentionSite,
        tokens: Tokens,
    ) -> Tensor | None:
        """Compute attention over sharded tokens; the mask covers the keys of all ranks."""

    def local(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None
    ) -> Tensor | None:
        """Compute attention over tokens that this rank holds."""


class SiteRouter:
    """The replaced attention function of one module.

    It counts the calls of each forward of the module to find their sites.

    Args:
        sites: sites of the module with equal functions, by index.
        tokens: state of the forward.
        kernel: attention of the engine, or None to exchange here and attend with the module's own function.
        token_dim: dimension of the tokens in the arguments: 1, or 2 for torch's function.

    Attributes:
        exchanges: number of calls by kind: ``local``, ``heads``, ``keys``, or the kind of the kernel.
    """

    def __init__(self, sites: Sequence[AttentionSite], tokens: Tokens, kernel: Kernel | None, token_dim: int) -> None:
        self.sites = sorted(sites, key=lambda site: site.index)
        self.tokens, self.kernel, self.token_dim = tokens, kernel, token_dim
        self.calls = 0
        self.exchanges: dict[str, int] = {}

    def restart(self, *_: Any) -> None:
        """Start to count the calls, when the module is entered."""
        self.calls = 0

    def attend(self, function: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Tensor:
        """Compute attention as ``function`` does, over the tokens of all ranks."""
        function = functools.partial(self._attend_local, function)
        options = {**dict(zip(_POSITIONAL, args, strict=False)), **options}
        attn_mask = options.pop("attn_mask", None)
        if attn_mask is not None and attn_mask.dim() == 2 and self.token_dim == 1:
            attn_mask = attn_mask[:, None, None]  # diffusers' function takes [B, keys], torch's [queries, keys]
        site = self.sites[min(self.calls, len(self.sites) - 1)]
        self.calls += 1
        if not self.tokens.sharded or all(stream == WHOLE for stream in site.keys):
            return self._count("local", function(query, key, value, attn_mask=attn_mask, **options))
        self._check(site, query, key)
        mask = self._whole_mask(site, attn_mask, key)
        if self.kernel is not None and not options.get("is_causal"):
            out = self._run_kernel(site, query, key, value, mask, options)
            if out is not None:
                return self._count(self.kernel.kind, out)
        heads_dim = 3 - self.token_dim
        world = self.tokens.exchange.world
        divisible = query.shape[heads_dim] % world == 0 and key.shape[heads_dim] % world == 0
        if divisible and WHOLE not in (*site.keys, *site.queries):
            return self._count("heads", self._exchange_heads(function, site, query, key, value, mask, options))
        return self._count("keys", self._exchange_keys(function, site, query, key, value, mask, options))

    def _count(self, kind: str, out: Tensor) -> Tensor:
        self.exchanges[kind] = self.exchanges.get(kind, 0) + 1
        return out

    def _check(self, site: AttentionSite, query: Tensor, key: Tensor) -> None:
        for name, x, streams in (("queries", query, site.queries), ("keys", key, site.keys)):
            known = [stream for stream in streams if stream != WHOLE]
            missing = [stream for stream in known if stream not in self.tokens.lengths]
            size = x.shape[self.token_dim]
            fits = not missing and (
                size >= self.tokens.local_total(known) if WHOLE in streams else size == self.tokens.local_total(known)
            )
            if not fits:
                raise ParallelError(
                    f"{site.module}: {size} {name} are not this rank's part of {'+'.join(streams)}",
                    code="plan_tokens",
                    hint="infer the plan from inputs of this kind: port-kit plan infer CLASS -o FILE",
                )

    def _attend_local(
        self, function: Any, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any
    ) -> Tensor:
        """Attend to tokens that this rank holds, by the engine if it supports the operands, else as the module does."""
        if self.kernel is not None and not options.get("is_causal") and not options.get("dropout_p"):
            out = self.kernel.local(*self._by_token(query, key, value), attn_mask, options.get("scale"))
            if out is not None:
                return out if self.token_dim == 1 else out.transpose(1, 2)
        return function(query, key, value, attn_mask=attn_mask, **options)

    def _by_token(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return operands as [B, S, N, H]."""
        if self.token_dim == 1:
            return query, key, value
        return query.transpose(-3, -2), key.transpose(-3, -2), value.transpose(-3, -2)

    def _run_kernel(
        self, site: AttentionSite, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: Any
    ) -> Tensor | None:
        assert self.kernel is not None
        out = self.kernel(*self._by_token(query, key, value), mask, options.get("scale"), site, self.tokens)
        return out if out is None or self.token_dim == 1 else out.transpose(1, 2)

    def _whole_mask(self, site: AttentionSite, mask: Tensor | None, key: Tensor) -> Tensor | None:
        """Return the mask over all keys, and over all queries if it differs between them."""
        if mask is None or site.mask != "sharded":
            return mask
        if mask.shape[-2] > 1:  # made of this rank's tokens on both sides: keep what it says about keys
            mask = mask.any(-2, keepdim=True) if mask.dtype is torch.bool else mask.amax(-2, keepdim=True)
        return self._gather(mask, mask.dim() - 1, site.keys)

    def _gather(self, x: Tensor, dim: int, streams: Sequence[str]) -> Tensor:
        """Gather the sharded parts of a dimension; complete parts stay."""
        if WHOLE not in streams:
            return self.tokens.gather(x, dim, streams)
        rest = x.shape[dim] - self.tokens.local_total([stream for stream in streams if stream != WHOLE])
        sizes = [rest if stream == WHOLE else self.tokens.local(stream) for stream in streams]
        parts = x.split(sizes, dim)
        gathered = [
            part if stream == WHOLE else self.tokens.gather(part, dim, [stream])
            for part, stream in zip(parts, streams, strict=True)
        ]
        return torch.cat(gathered, dim)

    def _exchange_keys(
        self, function: Any, site: AttentionSite, query: Tensor, key: Tensor, value: Tensor, mask: Any, options: Any
    ) -> Tensor:
        """All-gather keys and values; queries stay."""
        if options.get("is_causal"):
            raise ParallelError(
                f"{site.module}: causal attention needs heads that {self.tokens.exchange.world} ranks divide",
                code="parallel_degree",
                hint="use a degree that divides the number of heads",
            )
        key, value = (self._gather(x, self.token_dim, site.keys) for x in (key, value))
        if mask is not None and mask.shape[-2] > 1 and mask.shape[-2] != query.shape[self.token_dim]:
            mask = self.tokens.shard(mask, mask.dim() - 2, site.queries)
        return function(query, key, value, attn_mask=mask, **options)

    def _exchange_heads(
        self, function: Any, site: AttentionSite, query: Tensor, key: Tensor, value: Tensor, mask: Any, options: Any
    ) -> Tensor:
        """Exchange tokens for heads, attend to all tokens with this rank's heads, and exchange back."""
        tokens, exchange, dim = self.tokens, self.tokens.exchange, self.token_dim
        heads = 3 - dim

        def to_heads(x: Tensor, streams: Sequence[str]) -> Tensor:
            return tokens.join(exchange.all_to_all(x.chunk(exchange.world, heads)), dim, streams)

        query = to_heads(query, site.queries)
        key, value = to_heads(key, site.keys), to_heads(value, site.keys)
        if mask is not None and mask.dim() == 4 and mask.shape[1] > 1:
            mask = mask.chunk(exchange.world, 1)[exchange.rank]
        out = function(query, key, value, attn_mask=mask, **options)
        return torch.cat(exchange.all_to_all(tokens.spread(out, dim, site.queries)), heads)


def bind_sites(model: nn.Module, path: str, sites: Sequence[AttentionSite], tokens: Tokens, kernel: Any) -> SiteRouter:
    """Rebind the functions of one module that lead to its attention calls.

    Args:
        model: module of the plan.
        path: module that makes the calls.
        sites: its sites, with equal functions.
        tokens: state of the forward.
        kernel: see :class:`SiteRouter`.

    Returns:
        The router of these calls.

    Raises:
        ParallelError: ``plan_pattern``; the module has no such functions.
    """
    module, chain = model.get_submodule(path), sites[0].call
    router = SiteRouter(sites, tokens, kernel, 1 if chain[-1] == "dispatch_attention_fn" else 2)
    try:
        _rebind(module, chain, router)
    except (AttributeError, KeyError, IndexError, TypeError) as error:
        raise ParallelError(
            f"{path}: {' > '.join(chain)} is not a chain of functions of {type(module).__name__} ({error})",
            code="plan_pattern",
            hint="infer the plan from this class: port-kit plan infer CLASS -o FILE",
        ) from error
    module.register_forward_pre_hook(router.restart)
    return router


def _rebind(module: nn.Module, chain: Sequence[str], router: SiteRouter) -> None:
    methods = [name for name in chain[:-1] if "." in name or hasattr(type(module), name)]
    last = methods[-1]
    rest = chain[chain.index(last) + 1 :]
    if "." not in last:
        method = getattr(module, last)
        setattr(module, last, MethodType(_overlay(method.__func__, rest, router), module))
        return
    attribute, _, name = last.rpartition(".")
    owner = copy.copy(getattr(module, attribute))
    function = _overlay(getattr(type(owner), name), rest, router)
    owner.__class__ = type(type(owner).__name__, (type(owner),), {name: function})
    setattr(module, attribute, owner)


def _overlay(function: Any, chain: Sequence[str], router: SiteRouter) -> FunctionType:
    """Return a copy of a function in which the next function of the chain is replaced."""
    plain = function
    while hasattr(plain, "__wrapped__"):
        plain = plain.__wrapped__
    names = dict(plain.__globals__)
    if len(chain) > 1:
        names[chain[0]] = _overlay(names[chain[0]], chain[1:], router)
    elif chain[0] in names:
        names[chain[0]] = functools.partial(router.attend, names[chain[0]])
    else:
        replaced = {key: _proxy(value, router) for key, value in names.items() if _has_kernel(value)}
        if not replaced:
            raise KeyError(chain[0])
        names.update(replaced)
    result = FunctionType(plain.__code__, names, plain.__name__, plain.__defaults__, plain.__closure__)
    result.__kwdefaults__ = plain.__kwdefaults__
    return result


def _has_kernel(value: Any) -> bool:
    return isinstance(value, ModuleType) and value.__name__ in ("torch", "torch.nn", "torch.nn.functional")


class _Namespace:
    """A module with some attributes replaced."""

    def __init__(self, module: ModuleType, replaced: dict[str, Any]) -> None:
        self.__dict__.update(replaced)
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _proxy(module: Any, router: SiteRouter) -> Any:
    function = functools.partial(router.attend, torch.nn.functional.scaled_dot_product_attention)
    functional = _Namespace(torch.nn.functional, {"scaled_dot_product_attention": function})
    if module.__name__ == "torch.nn.functional":
        return functional
    namespace = _Namespace(torch.nn, {"functional": functional})
    return namespace if module.__name__ == "torch.nn" else _Namespace(torch, {"nn": namespace})
