"""Attention calls of a plan: the exchange of tokens and heads around each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from port_kit.autoparallel.attention_functions import AttentionCall, AttentionFunction
from port_kit.autoparallel.plan import AttentionSite
from port_kit.autoparallel.tokens import WHOLE, Tokens
from port_kit.errors import ParallelError


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
    """The replaced attention functions of one module.

    It counts the calls of each forward of the module to find their sites.

    Args:
        sites: sites of the module with equal functions, by index.
        tokens: state of the forward.
        kernel: attention of the engine, or None to exchange here and attend with the module's own function.

    Attributes:
        exchanges: number of calls by kind: ``local``, ``heads``, ``keys``, or the kind of the kernel.
    """

    def __init__(self, sites: Sequence[AttentionSite], tokens: Tokens, kernel: Kernel | None) -> None:
        self.sites = sorted(sites, key=lambda site: site.index)
        self.tokens, self.kernel = tokens, kernel
        self.calls = 0
        self.exchanges: dict[str, int] = {}

    def restart(self) -> None:
        """Start to count the calls, when the module is entered."""
        self.calls = 0

    def require_calls(self, module: nn.Module) -> None:
        """Check that the module made a call that needs tokens of other ranks, when it is left.

        Raises:
            ParallelError: ``plan_tokens``; it made none, for example because it chose another attention function.
        """
        if self.tokens.sharded and not self.calls and any(s != WHOLE for site in self.sites for s in site.keys):
            raise ParallelError(
                f"{self.sites[0].module}: {type(module).__name__} made no call of {' > '.join(self.sites[0].call)}",
                code="plan_tokens",
                hint="let the code use an attention function that docs/autoparallel.md lists",
            )

    def attend(self, signature: AttentionFunction, function: Any, *args: Any, **options: Any) -> Any:
        """Compute attention as ``function`` does, over the tokens of all ranks."""
        site = self.sites[min(self.calls, len(self.sites) - 1)]
        self.calls += 1
        if not self.tokens.sharded or all(stream == WHOLE for stream in site.keys):
            call = AttentionCall(signature, function, args, options)
            return self._count("local", self._attend_local(call, *call.tensors, call.mask))
        call = AttentionCall(signature, function, args, options, self._batch(signature, args, options, site))
        self._check(site, call)
        mask = self._whole_mask(site, call)
        if self.kernel is not None and call.is_regular:
            out = self._run_kernel(site, call, mask)
            if out is not None:
                return self._count(self.kernel.kind, call.wrap(out))
        world = self.tokens.exchange.world
        query, key, _ = call.tensors
        divisible = query.shape[2] % world == 0 and key.shape[2] % world == 0
        if divisible and WHOLE not in (*site.keys, *site.queries):
            return self._count("heads", self._exchange_heads(site, call, mask))
        return self._count("keys", self._exchange_keys(site, call, mask))

    def _batch(self, signature: AttentionFunction, args: Any, options: Any, site: AttentionSite) -> int | None:
        """Return the rows that are packed into the dimension of the tokens; None if none are."""
        if not signature.longest:
            return None
        query = args[0] if args else options[signature.parameters[0]]
        return len(query) // self.tokens.local_total([s for s in site.queries if s != WHOLE])

    def _count(self, kind: str, out: Any) -> Any:
        self.exchanges[kind] = self.exchanges.get(kind, 0) + 1
        return out

    def _check(self, site: AttentionSite, call: AttentionCall) -> None:
        query, key, _ = call.tensors
        for name, x, streams in (("queries", query, site.queries), ("keys", key, site.keys)):
            known = [stream for stream in streams if stream != WHOLE]
            missing = [stream for stream in known if stream not in self.tokens.lengths]
            size = x.shape[1]
            fits = not missing and (
                size >= self.tokens.local_total(known) if WHOLE in streams else size == self.tokens.local_total(known)
            )
            if not fits:
                raise ParallelError(
                    f"{site.module}: {size} {name} are not this rank's part of {'+'.join(streams)}",
                    code="plan_tokens",
                    hint="infer the plan from inputs of this kind: port-kit plan infer CLASS -o FILE",
                )

    def _run_kernel(self, site: AttentionSite, call: AttentionCall, mask: Tensor | None) -> Tensor | None:
        assert self.kernel is not None
        if mask is None and call.signature.lengths and WHOLE not in site.keys:
            mask = call.mask_of_lengths(self.tokens.total(site.keys))
        return self.kernel(*call.tensors, mask, call.scale, site, self.tokens)

    def _attend_local(self, call: AttentionCall, query: Tensor, key: Tensor, value: Tensor, mask: Any) -> Any:
        """Attend to tokens that this rank holds; return what the function of the call returns.

        The engine attends if it supports the operands, else the module's own function. A number of keys per row is
        left to that function: reading it would wait for the device.
        """
        by_length = call.given.get(call.signature.lengths) is not None
        if self.kernel is not None and call.is_regular and not by_length:
            out = self.kernel.local(query, key, value, mask, call.scale)
            if out is not None:
                return call.wrap(out)
        return call.run(query, key, value, mask)

    def _whole_mask(self, site: AttentionSite, call: AttentionCall) -> Any:
        """Return the mask over all keys, and over all queries if it differs between them."""
        mask = call.mask
        if not torch.is_tensor(mask) or site.mask != "sharded":
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

    def _exchange_keys(self, site: AttentionSite, call: AttentionCall, mask: Any) -> Any:
        """All-gather keys and values; queries stay."""
        if call.is_causal or call.signature.longest:
            kind = "causal attention" if call.is_causal else "attention to packed rows"
            raise ParallelError(
                f"{site.module}: {kind} needs heads that {self.tokens.exchange.world} ranks divide",
                code="parallel_degree",
                hint="use a degree that divides the number of heads",
            )
        query, *others = call.tensors
        key, value = (self._gather(x, 1, site.keys) for x in others)
        if torch.is_tensor(mask) and mask.shape[-2] > 1 and mask.shape[-2] != query.shape[1]:
            mask = self.tokens.shard(mask, mask.dim() - 2, site.queries)
        return self._attend_local(call, query, key, value, mask)

    def _exchange_heads(self, site: AttentionSite, call: AttentionCall, mask: Any) -> Any:
        """Exchange tokens for heads, attend to all tokens with this rank's heads, and exchange back."""
        tokens, exchange = self.tokens, self.tokens.exchange

        def to_heads(x: Tensor, streams: Sequence[str]) -> Tensor:
            return tokens.join(exchange.all_to_all(x.chunk(exchange.world, 2)), 1, streams)

        query, key, value = call.tensors
        query = to_heads(query, site.queries)
        key, value = to_heads(key, site.keys), to_heads(value, site.keys)
        if torch.is_tensor(mask) and mask.dim() == 4 and mask.shape[1] > 1:
            mask = mask.chunk(exchange.world, 1)[exchange.rank]
        returned = self._attend_local(call, query, key, value, mask)
        out = exchange.all_to_all(tokens.spread(call.result(returned), 1, site.queries))
        return call.wrap(torch.cat(out, 2), returned)
