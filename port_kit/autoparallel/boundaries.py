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
from port_kit.autoparallel.rebinding import Rebinder
from port_kit.autoparallel.sites import Kernel, SiteRouter
from port_kit.autoparallel.tokens import Tokens
from port_kit.autoparallel.tree import Arguments
from port_kit.parallel.halo import pad


@dataclass
class Boundary:
    """Hooks of one block that shard its arguments and gather its outputs.

    Attributes:
        enter: returns the positional and keyword arguments, sharded; takes the block and both.
        leave: returns the output, gathered; takes the block, its arguments and the output. None if tokens stay sharded.
        lifted: the caller of the block runs the hooks around a larger region.
    """

    enter: Callable[..., Any]
    leave: Callable[..., Any] | None
    lifted: bool = False

    def register(self, block: nn.Module) -> None:
        """Run the hooks at each call of a block, unless they are lifted."""

        def enter(*given: Any) -> Any:
            return None if self.lifted else self.enter(*given)

        def leave(*given: Any) -> Any:
            return None if self.lifted or self.leave is None else self.leave(*given)

        block.register_forward_pre_hook(enter, with_kwargs=True, prepend=True)
        block.register_forward_hook(leave)


@dataclass
class ShardedModel:
    """A module to which the sequence-parallel part of a plan was applied.

    Attributes:
        tokens: state of the current forward.
        routers: replaced attention calls by module path.
        boundaries: hooks by block.
    """

    tokens: Tokens
    routers: dict[str, list[SiteRouter]]
    boundaries: dict[nn.Module, Boundary]

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
    boundaries = _bound_streams(model, plan, tokens) if exchange.world > 1 else {}
    rebinder = Rebinder(model)
    routers: dict[str, list[SiteRouter]] = {}
    kernel_sites = [site for site in plan.attention if site.at == "kernel"]
    for (pattern, _), sites in groupby(sorted(kernel_sites, key=_chain), key=_chain):
        listed = list(sites)
        for path in find(model, pattern):
            routers.setdefault(path, []).append(rebinder.bind(path, listed, tokens, kernel))
    return ShardedModel(tokens, routers, boundaries)


def _bound_streams(model: nn.Module, plan: Plan, tokens: Tokens) -> dict[nn.Module, Boundary]:
    """Shard and gather at blocks, at modules that need all tokens, and at linears around attention.

    Returns:
        The boundaries of blocks.
    """
    boundaries: dict[nn.Module, Boundary] = {}
    for blocks in plan.blocks:
        if blocks.inputs or blocks.outputs:
            boundaries |= _bound_blocks(model, blocks, tokens)
    for whole in plan.whole:
        for module in find(model, whole.module).values():
            (_exchange_halo if whole.halo else _run_whole)(module, whole, tokens)
    for site in plan.attention:
        if site.at == "linears":
            bind_linears(model, plan, site, tokens)
    return boundaries


def _chain(site: AttentionSite) -> tuple[str, tuple[str, ...]]:
    return site.module, site.call


def _bound_blocks(model: nn.Module, blocks: Blocks, tokens: Tokens) -> dict[nn.Module, Boundary]:
    found = list(find(model, blocks.modules).values())
    boundaries = {}
    for block in found:
        gathers = blocks.gather == "each" or (blocks.gather == "last" and block is found[-1])
        leave = _gather_hook(blocks.outputs, tokens) if gathers else None
        boundaries[block] = Boundary(_shard_hook(block, blocks.inputs, tokens), leave)
        boundaries[block].register(block)
    return boundaries


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
        x, rows_before[0] = tokens.with_halo(args[0], axis.dim, stream, whole.halo, axis.grid)
        return (x, *args[1:]), kwargs

    def leave(_module: nn.Module, _args: Any, output: Any) -> Any:
        if not tokens.sharded:
            return None
        valid = tokens.valid(stream, tokens.exchange.rank, axis.grid)
        own = output.narrow(axis.dim, rows_before[0], valid)
        return pad(own, axis.dim, tokens.local(stream, axis.grid))

    module.register_forward_pre_hook(enter, with_kwargs=True, prepend=True)
    module.register_forward_hook(leave)
