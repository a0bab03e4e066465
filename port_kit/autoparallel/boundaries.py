"""Application of the streams and attention calls of a plan: hooks at block boundaries, and rebound attention calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from torch import nn

from port_kit.autoparallel.exchange import Exchange
from port_kit.autoparallel.linear_sites import bind_linears
from port_kit.autoparallel.plan import AttentionSite, Blocks, Plan, TokenAxis, WholeModule, find
from port_kit.autoparallel.sites import Kernel, SiteRouter, bind_sites
from port_kit.autoparallel.tokens import Tokens, pad
from port_kit.autoparallel.tree import Arguments


@dataclass
class ShardedModel:
    """A module to which the sequence-parallel part of a plan was applied.

    Attributes:
        tokens: state of the current forward.
        routers: replaced attention calls by module path.
    """

    tokens: Tokens
    routers: dict[str, list[SiteRouter]]

    def exchanges(self) -> dict[str, int]:
        """Return the number of attention calls by kind of exchange."""
        total: dict[str, int] = {}
        for router in (router for routers in self.routers.values() for router in routers):
            for kind, count in router.exchanges.items():
                total[kind] = total.get(kind, 0) + count
        return total


def shard_tokens(model: nn.Module, plan: Plan, exchange: Exchange, kernel: Kernel | None = None) -> ShardedModel:
    """Shard the token streams of a module, in place, and route its attention calls.

    Args:
        model: module whose blocks the plan names.
        plan: the plan.
        exchange: ranks that shard tokens; with one rank, only the attention calls change.
        kernel: attention of the engine; None to exchange heads or keys around the module's own call.

    Raises:
        ParallelError: ``plan_pattern``; the module lacks what the plan names.
    """
    tokens = Tokens(exchange)
    model.register_forward_pre_hook(lambda *_: tokens.reset(), prepend=True)
    if exchange.world > 1:
        _bound_streams(model, plan, tokens)
    routers: dict[str, list[SiteRouter]] = {}
    kernel_sites = [site for site in plan.attention if site.at == "kernel"]
    for (pattern, _), sites in groupby(sorted(kernel_sites, key=_chain), key=_chain):
        listed = list(sites)
        for path in find(model, pattern):
            routers.setdefault(path, []).append(bind_sites(model, path, listed, tokens, kernel))
    return ShardedModel(tokens, routers)


def _bound_streams(model: nn.Module, plan: Plan, tokens: Tokens) -> None:
    """Shard and gather at blocks, at modules that need all tokens, and at linears around attention."""
    for blocks in plan.blocks:
        if blocks.inputs or blocks.outputs:
            _bound_blocks(model, blocks, tokens)
    for whole in plan.whole:
        for module in find(model, whole.module).values():
            (_exchange_halo if whole.halo else _run_whole)(module, whole, tokens)
    for site in plan.attention:
        if site.at == "linears":
            bind_linears(model, plan, site, tokens)


def _chain(site: AttentionSite) -> tuple[str, tuple[str, ...]]:
    return site.module, site.call


def _bound_blocks(model: nn.Module, blocks: Blocks, tokens: Tokens) -> None:
    found = list(find(model, blocks.modules).values())
    for block in found:
        block.register_forward_pre_hook(_shard_hook(block, blocks.inputs, tokens), with_kwargs=True, prepend=True)
        if blocks.gather == "each" or (blocks.gather == "last" and block is found[-1]):
            block.register_forward_hook(_gather_hook(blocks.outputs, tokens))


def _shard_hook(block: nn.Module, axes: Sequence[TokenAxis], tokens: Tokens) -> Callable[..., Any]:
    names = Arguments(block)

    def hook(_module: nn.Module, args: Any, kwargs: Any) -> Any:
        named = names.named(args, kwargs)
        tokens.learn(axes, named)
        tokens.sharded = True
        return names.split(tokens.shard_all(axes, named), args)

    return hook


def _gather_hook(axes: Sequence[TokenAxis], tokens: Tokens) -> Callable[..., Any]:
    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        tokens.sharded = False
        return tokens.gather_all(axes, output)

    return hook


def _run_whole(module: nn.Module, whole: WholeModule, tokens: Tokens) -> None:
    """Gather the arguments of a module and shard its outputs, between the blocks' boundaries only."""
    names = Arguments(module)
    inside = [0]

    def enter(_module: nn.Module, args: Any, kwargs: Any) -> Any:
        if not tokens.sharded:
            return None
        named = tokens.gather_all(whole.inputs, names.named(args, kwargs))
        inside[0], tokens.sharded = inside[0] + 1, False
        return names.split(named, args)

    def leave(_module: nn.Module, _args: Any, output: Any) -> Any:
        if not inside[0]:
            return None
        inside[0], tokens.sharded = inside[0] - 1, True
        return tokens.shard_all(whole.outputs, output)

    module.register_forward_pre_hook(enter, with_kwargs=True, prepend=True)
    module.register_forward_hook(leave)


def _exchange_halo(module: nn.Module, whole: WholeModule, tokens: Tokens) -> None:
    """Add the neighbors' rows to the input of a convolution and remove the rows that they give from its output."""
    (axis,), stream = whole.inputs, whole.inputs[0].streams[0]
    rows_before = [0]

    def enter(_module: nn.Module, args: Any, kwargs: Any) -> Any:
        if not tokens.sharded:
            return None
        x, rows_before[0] = tokens.with_halo(args[0], axis.dim, stream, whole.halo)
        return (x, *args[1:]), kwargs

    def leave(_module: nn.Module, _args: Any, output: Any) -> Any:
        if not tokens.sharded:
            return None
        valid = tokens.valid(stream, tokens.exchange.rank, 2)
        own = output.narrow(axis.dim, rows_before[0], valid)
        return pad(own, axis.dim, tokens.local(stream, 2))

    module.register_forward_pre_hook(enter, with_kwargs=True, prepend=True)
    module.register_forward_hook(leave)
