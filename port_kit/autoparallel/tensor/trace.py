"""Connections between the channels of a block's linears, measured with gradients.

The block runs once. The output of each linear becomes a leaf of the autograd graph. So the gradient of one input
channel of a linear shows the channels just before it: outputs of other linears, the block's own inputs, and parameters
of other modules. Operators between linears are not inspected: fused projections, gated units, interleaved or grouped
heads and linear attention are all the same.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from port_kit.autoparallel.tensor.blocks import Arguments, channel_axis, copy_arguments, is_linear
from port_kit.autoparallel.tree import Arguments as Names
from port_kit.autoparallel.tree import leaves, rebuild

#: Numbers above this one are those of additive masks.
MASK = 1e3


class Side(NamedTuple):
    """Channels of one module: the input or output of a linear, or a norm over all channels."""

    kind: Literal["in", "out", "norm"]
    module: str


class Node(NamedTuple):
    """One channel of a side."""

    side: Side
    channel: int


class Axis(NamedTuple):
    """One axis of an input of the block, or of a parameter that belongs to no linear.

    Attributes:
        kind: ``input`` or ``parameter``.
        name: dotted path of the input by its name in ``forward``, or name of the parameter.
        dim: number of the axis.
    """

    kind: Literal["input", "parameter"]
    name: str
    dim: int


@dataclass
class Connections:
    """Connections of one block.

    Attributes:
        sizes: channels of each side.
        positions: largest number of positions (tokens of all rows of the batch) of each side.
        parents: disjoint sets of nodes that must be on one rank.
        reads: per node, entries of axes that it depends on, as bits.
        exits: nodes that the block's result depends on without another linear in between.
        extents: sizes of the axes of inputs and parameters.
        one_to_one: norms of which each input channel depends on one channel of a linear and on no input of the block.
        mixing: channels of which one position depends on several positions of other linears' outputs.
    """

    sizes: dict[Side, int] = field(default_factory=dict)
    positions: dict[Side, int] = field(default_factory=lambda: defaultdict(int))
    parents: dict[Node, Node] = field(default_factory=dict)
    reads: dict[Node, dict[Axis, int]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(int)))
    exits: set[Node] = field(default_factory=set)
    extents: dict[Axis, int] = field(default_factory=dict)
    one_to_one: set[str] = field(default_factory=set)
    mixing: set[Node] = field(default_factory=set)

    def root(self, node: Node) -> Node:
        """Return the representative of a node's set."""
        self.parents.setdefault(node, node)
        while self.parents[node] != node:
            self.parents[node] = self.parents[self.parents[node]]
            node = self.parents[node]
        return node

    def join(self, one: Node, other: Node) -> None:
        """Put two nodes on one rank."""
        self.parents[self.root(one)] = self.root(other)


@dataclass
class _Graph:
    """Tensors of one run: leaves with their side, and the tensors whose gradients are read."""

    sources: list[tuple[Side, int, Tensor]] = field(default_factory=list)
    sinks: list[tuple[Side, int, Tensor]] = field(default_factory=list)
    probes: list[tuple[str, Tensor]] = field(default_factory=list)
    inputs: dict[str, Tensor] = field(default_factory=dict)
    parameters: dict[str, Tensor] = field(default_factory=dict)
    results: list[Tensor] = field(default_factory=list)
    noise: torch.Generator | None = None


def trace(
    block: nn.Module, given: Arguments, *, skip: set[str], cut: set[str], probe: set[str], seed: int, into: Connections
) -> None:
    """Run a block once and add its connections.

    Args:
        block: in evaluation mode, with values in which no channel is zero.
        given: arguments of the call.
        skip: linears that are not considered.
        cut: norms that are treated as if each channel was independent.
        probe: norms to test for ``one_to_one``.
        seed: of the weights of gradients and of the noise added to inputs.
        into: connections to extend.
    """
    own = {
        f"{path}.{leaf}" for path, module in block.named_modules() if is_linear(module) for leaf in ("weight", "bias")
    }
    kept = {name: p for name, p in block.named_parameters() if name not in own and p.dim() and p.is_floating_point()}
    flags = {name: p.requires_grad for name, p in block.named_parameters()}
    for name, parameter in block.named_parameters():
        parameter.requires_grad_(name in kept)
    try:
        for allow_mutation in (nullcontext, torch.autograd.graph.allow_mutation_on_saved_tensors):
            graph = _Graph(parameters=dict(kept), noise=torch.Generator().manual_seed(seed) if seed else None)
            try:
                with torch.enable_grad(), allow_mutation(), _hooks(block, graph, skip, cut, probe):
                    _run(block, given, graph, into, seed)
                return
            except RuntimeError as error:  # the mode for code that works in place is slow
                if "modified by an inplace operation" not in str(error):
                    raise
    finally:
        for name, parameter in block.named_parameters():
            parameter.requires_grad_(flags[name])


def _run(block: nn.Module, given: Arguments, graph: _Graph, into: Connections, seed: int) -> None:
    args, kwargs = _leaf_arguments(block, given, graph, seed)
    result = block(*args, **kwargs)
    graph.results = [x for _, x in leaves(result) if torch.is_tensor(x) and x.requires_grad]
    _read(graph, into, seed)


def _leaf_arguments(block: nn.Module, given: Arguments, graph: _Graph, seed: int) -> Arguments:
    generator = torch.Generator().manual_seed(seed)

    def change(path: str, x: Any) -> Any:
        if not torch.is_tensor(x) or not (x.is_floating_point() or x.is_complex()):
            return x
        if seed and x.dim() >= 3:
            x = _varied(x, generator)
        graph.inputs[path] = x.detach().requires_grad_()
        return graph.inputs[path].clone()

    args, kwargs = copy_arguments(given)
    names = Names(block)
    return names.split(rebuild(names.named(args, kwargs), change), args)


def _varied(x: Tensor, generator: torch.Generator) -> Tensor:
    """Add noise as large as the values; zeros and the large numbers of masks stay."""
    scale = x.abs().median() if x.numel() else x.abs().sum()
    if float(scale) > MASK:
        return x
    noise = torch.randn(x.shape, generator=generator).to(x.dtype) * scale
    return torch.where((x == 0) | (x.abs() > MASK), x, x + noise)


@contextmanager
def _hooks(block: nn.Module, graph: _Graph, skip: set[str], cut: set[str], probe: set[str]) -> Iterator[None]:
    hooks = []
    for path, module in block.named_modules():
        if is_linear(module) and path not in skip:
            hooks.append(module.register_forward_hook(_cut_linear(path, graph), with_kwargs=True))
        elif path in cut:
            hooks.append(module.register_forward_hook(_cut_norm(path, graph)))
        elif path in probe:
            hooks.append(module.register_forward_hook(_probe_norm(path, graph)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _leaf(x: Tensor, graph: _Graph) -> tuple[Tensor, Tensor]:
    """Return a leaf with values around those of ``x``, and a copy of it that may be modified in place.

    The noise is larger than the values: an activation that is inactive for all tokens of one run is active in another.
    """
    x = x.detach()
    if graph.noise is not None and x.is_floating_point():
        x = x + torch.randn(x.shape, generator=graph.noise).to(x.dtype) * 2 * x.square().mean().sqrt()
    leaf = x.requires_grad_()
    return leaf, leaf.clone()


def _cut_linear(path: str, graph: _Graph) -> Any:
    def hook(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
        x = args[0] if args else next(iter(kwargs.values()))
        graph.sinks.append((Side("in", path), channel_axis(module, x), x))
        leaf, copy = _leaf(output, graph)
        graph.sources.append((Side("out", path), channel_axis(module, output), leaf))
        return copy

    return hook


def _cut_norm(path: str, graph: _Graph) -> Any:
    def hook(_module: nn.Module, args: Any, output: Tensor) -> Tensor:
        graph.sinks.append((Side("norm", path), args[0].dim() - 1, args[0]))
        leaf, copy = _leaf(output, graph)
        graph.sources.append((Side("norm", path), output.dim() - 1, leaf))
        return copy

    return hook


def _probe_norm(path: str, graph: _Graph) -> Any:
    def hook(_module: nn.Module, args: Any, _output: Tensor) -> None:
        graph.probes.append((path, args[0]))

    return hook


def _read(graph: _Graph, into: Connections, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for side, axis, x in (*graph.sources, *graph.sinks):
        into.positions[side] = max(into.positions[side], x.numel() // max(x.shape[axis], 1))
    for side, axis, leaf in graph.sources:
        into.sizes[side] = leaf.shape[axis]
    for side, axis, x in graph.sinks:
        into.sizes[side] = x.shape[axis]
        if x.requires_grad:
            _read_sink(graph, into, side, axis, x, seed)
    for kind, table in (("input", graph.inputs), ("parameter", graph.parameters)):
        for name, x in table.items():
            into.extents.update({Axis(kind, name, dim): x.shape[dim] for dim in range(x.dim())})  # type: ignore[arg-type]
    for result in graph.results if graph.sources else ():
        weights = _weights(result, generator)
        grads = torch.autograd.grad(result, _leaves(graph), weights, retain_graph=True, allow_unused=True)
        for (side, axis, _), grad in zip(graph.sources, grads, strict=True):
            if grad is not None:
                used = _used(grad[None], axis)[0].nonzero().flatten().tolist()
                into.exits.update(Node(side, channel) for channel in used)
    for path in {path for path, _ in graph.probes}:
        if all(_is_one_to_one(graph, x, generator) for name, x in graph.probes if name == path):
            into.one_to_one.add(path)


def _leaves(graph: _Graph) -> list[Tensor]:
    return [leaf for *_, leaf in graph.sources]


def _read_sink(graph: _Graph, into: Connections, side: Side, axis: int, x: Tensor, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensors = [*_leaves(graph), *graph.inputs.values(), *graph.parameters.values()]
    grads = _gradients(x, axis, tensors, _weights(x, generator))
    for (source, source_axis, _), grad in zip(graph.sources, grads, strict=False):
        if grad is not None:
            _join(into, side, source, _used(grad, source_axis))
    keys = [("input", name) for name in graph.inputs] + [("parameter", name) for name in graph.parameters]
    for (kind, name), grad in zip(keys, grads[len(graph.sources) :], strict=True):
        for dim in range(grad.dim() - 1 if grad is not None else 0):
            for channel, bits in enumerate(_bits(_used(grad, dim))):  # type: ignore[arg-type]
                if bits:
                    into.reads[Node(side, channel)][Axis(kind, name, dim)] |= bits  # type: ignore[arg-type]
    if side.kind == "in" and seed == 0:
        _read_mixing(graph, into, side, axis, x)


def _join(into: Connections, side: Side, source: Side, table: Tensor) -> None:
    """Join each channel of a side with the channels of a source that it depends on."""
    first: dict[int, int] = {}
    for channel, bits in enumerate(_bits(table)):
        if bits and bits not in first:
            entries = table[channel].nonzero().flatten().tolist()
            first[bits] = entries[0]
            for entry in entries[1:]:
                into.join(Node(source, entries[0]), Node(source, entry))
        if bits:
            into.join(Node(side, channel), Node(source, first[bits]))


def _bits(table: Tensor) -> list[int]:
    """Return the rows of a boolean table as bits."""
    packed = np.packbits(table.numpy(), axis=1, bitorder="little")
    return [int.from_bytes(row.tobytes(), "little") for row in packed]


def _weights(x: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(x.shape, generator=generator).to(x.dtype)


def _gradients(x: Tensor, axis: int, tensors: list[Tensor], combined: Tensor) -> list[Tensor | None]:
    """Return the gradients of each channel's entries, weighted by ``combined``: ``[channels, *shape]`` per tensor."""
    if not tensors:
        return []
    channels = x.shape[axis]
    reached = torch.autograd.grad(x, tensors, combined, retain_graph=True, allow_unused=True)
    used = [i for i, grad in enumerate(reached) if grad is not None]
    found: list[Tensor | None] = [None] * len(tensors)
    if used:
        shape = (channels if d == axis else 1 for d in range(x.dim()))
        chosen = torch.eye(channels, dtype=x.dtype).reshape(channels, *shape)
        weights = chosen * combined
        grads = _batched_grad(x, [tensors[i] for i in used], weights)
        for i, grad in zip(used, grads, strict=True):
            found[i] = grad
    return found


def _batched_grad(x: Tensor, tensors: list[Tensor], weights: Tensor) -> list[Tensor | None]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # operators without a batching rule run in a loop
            return list(
                torch.autograd.grad(x, tensors, weights, retain_graph=True, allow_unused=True, is_grads_batched=True)
            )
    except RuntimeError:  # an operator that cannot run in vmap
        rows = [torch.autograd.grad(x, tensors, w, retain_graph=True, allow_unused=True) for w in weights]
        return [torch.stack(column) if column[0] is not None else None for column in zip(*rows, strict=True)]


def _used(grad: Tensor, axis: int) -> Tensor:
    """Return ``[channels, entries of the axis]``: True where there is a gradient."""
    rest = [d for d in range(1, grad.dim()) if d != axis + 1]
    return grad.ne(0).any(dim=rest) if rest else grad.ne(0)


def _read_mixing(graph: _Graph, into: Connections, side: Side, axis: int, x: Tensor) -> None:
    """Find the channels whose first position depends on several positions of other linears' outputs."""
    weights = torch.zeros_like(x)
    weights[tuple(slice(None) if dim == axis else 0 for dim in range(x.dim()))] = 1
    grads = _gradients(x, axis, _leaves(graph), weights)
    for (_, source_axis, _), grad in zip(graph.sources, grads, strict=True):
        if grad is not None:
            positions = grad.ne(0).any(dim=source_axis + 1).flatten(1).sum(1)
            into.mixing.update(Node(side, channel) for channel in (positions > 1).nonzero().flatten().tolist())


def _is_one_to_one(graph: _Graph, x: Tensor, generator: torch.Generator) -> bool:
    if not x.requires_grad:
        return False
    sources = _leaves(graph)
    grads = _gradients(x, x.dim() - 1, [*sources, *graph.inputs.values()], _weights(x, generator))
    if any(grad is not None and bool(grad.any()) for grad in grads[len(sources) :]):
        return False
    tables = [_used(grad, axis) for (_, axis, _), grad in zip(graph.sources, grads, strict=False) if grad is not None]
    return all(bool((table.sum(0) <= 1).all() and (table.sum(1) <= 1).all()) for table in tables)
