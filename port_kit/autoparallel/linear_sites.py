"""Attention sites that exchange tokens and heads at linears: any code between them runs on all tokens with local heads.

After the linears before the site (queries, keys, values), each rank receives all tokens of its units. Before the linear
after the site, it receives its tokens of all units. Norms over all channels between them reduce their statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import tensor_model_parallel_all_reduce

from port_kit.autoparallel.plan import AttentionSite, ChannelRule, Plan, TokenAxis, find, find_linears
from port_kit.autoparallel.tensor.apply import UnitSizes
from port_kit.autoparallel.tensor.divided import divide_attribute
from port_kit.autoparallel.tensor.layers import ShardedNorm, local_part, norm_eps
from port_kit.autoparallel.tokens import Tokens
from port_kit.autoparallel.tree import Arguments
from port_kit.errors import ParallelError


def bind_linears(model: nn.Module, plan: Plan, site: AttentionSite, tokens: Tokens) -> None:
    """Exchange tokens and units at the linears of a site, in every module that its pattern names.

    Args:
        model: module of the plan.
        plan: plan with the channels of the linears.
        site: site with ``at="linears"``.
        tokens: state of the forward.

    Raises:
        ParallelError: ``parallel_degree``; the ranks do not divide the units.
    """
    sizes = UnitSizes(model, plan)
    axes = {axis.path: axis for axis in site.axes}
    for module_path, module in find(model, site.module).items():
        if site.gathered:
            module.register_forward_pre_hook(_gather_arguments(module, site, tokens), with_kwargs=True, prepend=True)
        for linear in plan.linears:
            for path, child in _below(find_linears(model, linear), module_path):
                axis = axes.get(path.removeprefix(f"{module_path}."))
                parts = _parts(sizes, path, linear.channels, tokens)
                if linear.role == "column":
                    if site.gathered and axis is not None:
                        child.register_forward_pre_hook(_own_tokens(axis, tokens))
                    child.register_forward_hook(_to_units(parts, axis, tokens))
                else:
                    assert axis is not None
                    child.register_forward_pre_hook(_to_tokens(parts, axis, tokens))
        for norm in plan.norms:
            for path, child in _below(find(model, norm.module), module_path):
                _exchange_statistics(child, path, norm.kind, _parts(sizes, path, norm.channels, tokens), tokens)
        for value in plan.divided:
            for path, child in _below(find(model, value.module), module_path):
                world = tokens.exchange.world
                divide_attribute(child, path, value, world, code="parallel_degree", degree="sequence-parallel")


def _below(found: Mapping[str, nn.Module], module_path: str) -> list[tuple[str, nn.Module]]:
    return [(path, child) for path, child in found.items() if f"{path}.".startswith(f"{module_path}.")]


def _parts(
    sizes: UnitSizes, path: str, rules: Sequence[ChannelRule], tokens: Tokens
) -> Callable[[int], tuple[int, ...]]:
    """Return a function from the number of channels to the sizes of their parts, checked for the number of ranks."""

    def parts(extent: int) -> tuple[int, ...]:
        found = sizes.parts(path, rules, extent)
        if any(size % tokens.exchange.world for size in found):
            raise _indivisible(path, tokens.exchange.world)
        return found

    return parts


def _gather_arguments(module: nn.Module, site: AttentionSite, tokens: Tokens) -> Callable[..., Any]:
    names = Arguments(module)

    def hook(_module: nn.Module, args: Any, kwargs: Any) -> Any:
        return names.split(tokens.gather_all(site.gathered, names.named(args, kwargs)), args)

    return hook


def _own_tokens(axis: TokenAxis, tokens: Tokens) -> Callable[..., Any]:
    def hook(_module: nn.Module, args: Any) -> Any:
        return (tokens.shard(args[0], axis.dim, axis.streams), *args[1:])

    return hook


def _to_units(parts: Callable[[int], tuple[int, ...]], axis: TokenAxis | None, tokens: Tokens) -> Callable[..., Tensor]:
    def hook(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        exchange, sizes = tokens.exchange, parts(output.shape[-1])
        if axis is None:  # tokens that are complete on every rank
            return local_part(output, -1, sizes, exchange.rank, exchange.world)
        sent = [local_part(output, -1, sizes, rank, exchange.world) for rank in range(exchange.world)]
        return tokens.join(exchange.all_to_all(sent), axis.dim, axis.streams)

    return hook


def _to_tokens(parts: Callable[[int], tuple[int, ...]], axis: TokenAxis, tokens: Tokens) -> Callable[..., Any]:
    def hook(_module: nn.Module, args: Any) -> Any:
        exchange = tokens.exchange
        sizes = parts(args[0].shape[-1] * exchange.world)
        own = [size // exchange.world for size in sizes]
        received = exchange.all_to_all(tokens.spread(args[0], axis.dim, axis.streams))
        by_rank = [x.split(own, -1) for x in received]
        return (torch.cat([split[part] for part in range(len(own)) for split in by_rank], -1), *args[1:])

    return hook


def _exchange_statistics(
    norm: nn.Module, path: str, kind: str, parts: Callable[[int], tuple[int, ...]], tokens: Tokens
) -> None:
    """Replace the ``forward`` of a norm; its parameters stay as tensor parallelism left them."""
    eps = norm_eps(norm)
    tensor_ranks = norm.ranks if isinstance(norm, ShardedNorm) else 1

    def total(x: Tensor) -> Tensor:
        own = torch.stack(tokens.exchange.all_gather(x.sum(-1, keepdim=True))).sum(0)
        return tensor_model_parallel_all_reduce(own) if tensor_ranks > 1 else own

    def forward(x: Tensor) -> Tensor:
        world, rank = tokens.exchange.world, tokens.exchange.rank
        wide, own = x.float(), x.shape[-1] * world  # the channels of this tensor-parallel rank
        channels = own * tensor_ranks
        if kind == "layer":
            wide = wide - total(wide) / channels
        floor = torch.finfo(x.dtype).eps if eps is None else eps
        normed = (wide * torch.rsqrt(total(wide.square()) / channels + floor)).to(x.dtype)
        for name, combine in (("weight", torch.mul), ("bias", torch.add)):
            whole = getattr(norm, name, None)
            if whole is not None:
                normed = combine(normed, local_part(whole, 0, parts(own), rank, world))
        return normed

    norm.forward = forward


def _indivisible(path: str, ranks: int) -> ParallelError:
    return ParallelError(
        f"{path}: {ranks} sequence-parallel ranks do not divide its channels",
        code="parallel_degree",
        hint="use a degree that divides the number of heads",
    )
