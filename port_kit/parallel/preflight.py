"""Preflight: the layouts that a model supports and the weight bytes per rank, before any weight is loaded.

:func:`describe_model` reads a model that was built on the meta device::

    with meta_init(torch.bfloat16):
        shape = describe_model(build_transformer(config), branches=4)
    plan = preflight(Layout.parse("tp2xulysses2"), shape, ranks=4)
    plan.weight_bytes           # of the transformer, on the rank with the most
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from port_kit.errors import ParallelError
from port_kit.parallel.layout import UAA, Layout, divisors

if TYPE_CHECKING:
    from torch import nn

#: Blocks that are gathered at the same time under HSDP: the running one and the prefetched one.
GATHERED_BLOCKS = 2
#: Bytes per gigabyte.
GIGABYTE = 10**9
#: Kinds that split a sequence. Only Ulysses restricts the degree.
SEQUENCE_KINDS = ("ulysses", "ring", "allgather")


@dataclass(frozen=True)
class ModelShape:
    """Properties of a model's transformers that determine its layouts.

    Attributes:
        heads: greatest common divisor of all layers' attention heads.
        ulysses_heads: the same of the layers whose heads Ulysses divides, which excludes those that gather an operand.
        widths: greatest common divisor of all widths that tensor parallelism splits.
        branches: guidance branches per step, 1 without guidance.
        split_bytes: bytes of parameters that tensor parallelism splits.
        replicated_bytes: bytes of parameters that tensor parallelism replicates.
        block_bytes: bytes of the largest block that HSDP shards; 0 if no module matches its conditions.
        sharded: True if a transformer declares an ``_sp_plan``.
    """

    heads: int
    ulysses_heads: int
    widths: int
    branches: int
    split_bytes: int
    replicated_bytes: int
    block_bytes: int
    sharded: bool

    @property
    def weight_bytes(self) -> int:
        """Bytes of all parameters."""
        return self.split_bytes + self.replicated_bytes


@dataclass(frozen=True)
class Preflight:
    """A supported layout and its memory.

    Attributes:
        layout: the layout.
        weight_bytes: bytes of transformer weights on the rank with the most.
        peak_weight_bytes: the same while a block runs; differs from ``weight_bytes`` only under HSDP.
        idle_ranks: guidance ranks without a branch.
    """

    layout: Layout
    weight_bytes: int
    peak_weight_bytes: int
    idle_ranks: int

    def to_json(self) -> dict[str, Any]:
        """Return the result as JSON-serialisable values."""
        return {
            "layout": str(self.layout),
            "ranks": self.layout.world,
            "parallel_config": self.layout.parallel_config,
            "weight_bytes": self.weight_bytes,
            "peak_weight_bytes": self.peak_weight_bytes,
            "idle_ranks": self.idle_ranks,
        }


def describe_model(*denoisers: nn.Module, branches: int = 1) -> ModelShape:
    """Return the shape of a model that was built for one rank, for example on the meta device.

    Args:
        denoisers: the transformers, and the modules that they share; they consist of vLLM's linears and vLLM-Omni's
            ``Attention``.
        branches: guidance branches per step.
    """
    from vllm_omni.diffusion.attention.layer import Attention

    modules = [module for denoiser in denoisers for module in denoiser.modules()]
    attentions = [module for module in modules if isinstance(module, Attention)]
    divided = [module.num_heads for module in attentions if getattr(module, "divides_heads", True)]
    widths = [width for denoiser in denoisers for width in _split_widths(denoiser)]
    split = sum(_bytes(parameter) for denoiser in denoisers for parameter in _split_parameters(denoiser))
    total = sum(_bytes(parameter) for denoiser in denoisers for parameter in denoiser.parameters())
    return ModelShape(
        heads=math.gcd(*(module.num_heads for module in attentions)),
        ulysses_heads=math.gcd(*divided),
        widths=math.gcd(*widths) if widths else 1,
        branches=branches,
        split_bytes=split,
        replicated_bytes=total - split,
        block_bytes=max(map(_largest_block, denoisers)),
        sharded=any(getattr(denoiser, "_sp_plan", None) for denoiser in denoisers),
    )


def preflight(layout: Layout, shape: ModelShape, *, ranks: int | None = None) -> Preflight:
    """Check a layout against a model and the number of available ranks.

    Raises:
        ParallelError: ``parallel_degree``. ``details["problems"]`` lists all problems, ``details["possible"]`` the
            supported degrees per kind, ``details["weight_bytes"]`` the weight bytes per rank for each of them.
    """
    problems = list(_problems(layout, shape))
    if ranks is not None and layout.world > ranks:
        problems.append(f"{layout} needs {layout.world} ranks, got {ranks}")
    if problems:
        possible = possible_degrees(shape, ranks)
        raise ParallelError(
            "; ".join(problems),
            code="parallel_degree",
            hint="supported: "
            + ", ".join(_suggest(kind, degrees, shape) for kind, degrees in possible.items())
            + f"; one rank holds {shape.weight_bytes / GIGABYTE:.3g} GB of weights",
            problems=problems,
            possible={kind: list(degrees) for kind, degrees in possible.items()},
            weight_bytes={
                f"{kind}{degree}": weight_bytes(Layout.parse(f"{kind}{degree}"), shape)
                for kind, degrees in possible.items()
                for degree in degrees
            },
        )
    held = weight_bytes(layout, shape)
    peak = held + min(GATHERED_BLOCKS * shape.block_bytes, shape.weight_bytes) if layout.hsdp > 1 else held
    return Preflight(layout, held, peak, max(0, layout.cfg - shape.branches))


def _suggest(kind: str, degrees: list[int], shape: ModelShape) -> str:
    """Format the supported degrees of a kind, with weight bytes per rank if it splits weights."""
    held = [weight_bytes(Layout.parse(f"{kind}{degree}"), shape) for degree in degrees]
    if held[0] >= shape.weight_bytes:
        return f"{kind} {_listed(degrees)}"
    sizes = ", ".join(f"{size / GIGABYTE:.3g}" for size in held)
    return f"{kind} {_listed(degrees)} ({sizes} GB of weights per rank)"


def weight_bytes(layout: Layout, shape: ModelShape) -> int:
    """Return the bytes of transformer weights on the rank with the most, while no block runs."""
    split = -(-shape.split_bytes // layout.tp)
    return -(-(split + shape.replicated_bytes) // layout.hsdp)


def possible_degrees(shape: ModelShape, ranks: int | None = None) -> Mapping[str, list[int]]:
    """Return the supported degrees above 1 of each kind alone."""
    limit = ranks or 64
    free = list(range(2, min(limit, 8) + 1))
    shardable = free if shape.sharded else []
    degrees = {
        "tp": _from_two(_tensor_degrees(shape), limit),
        "ulysses": _from_two(divisors(shape.ulysses_heads), limit) if shape.sharded else [],
        "ring": shardable,
        "allgather": shardable,
        "cfg": _from_two(divisors(shape.branches), limit),
        "hsdp": free if shape.block_bytes else [],
    }
    return {kind: found for kind, found in degrees.items() if found}


def _problems(layout: Layout, shape: ModelShape) -> Iterator[str]:
    if layout.tp not in _tensor_degrees(shape):
        yield (
            f"tp {layout.tp} does not divide {shape.heads} heads and widths of {shape.widths}: "
            f"use {_listed(_tensor_degrees(shape))}"
        )
    elif (shape.ulysses_heads // layout.tp) % layout.ulysses and not layout.uaa:
        here, padded = shape.ulysses_heads // layout.tp, f"ulysses{layout.ulysses}{UAA}"
        yield (
            f"ulysses {layout.ulysses} does not divide the {here} heads per rank ({padded} pads them): "
            f"use {_listed(divisors(here))}"
        )
    if layout.sequence > 1 and not shape.sharded:
        kinds = [kind for kind in SEQUENCE_KINDS if kind in layout.degrees]
        yield f"{' and '.join(kinds)} cannot split the sequence: the transformer declares no _sp_plan"
    if layout.cfg > shape.branches:
        use = _listed(divisors(shape.branches))
        yield f"cfg {layout.cfg} has more ranks than the {shape.branches} branches: use {use}"
    if layout.hsdp > 1 and not shape.block_bytes:
        yield "hsdp cannot shard any block: no module matches _hsdp_shard_conditions"


def _tensor_degrees(shape: ModelShape) -> list[int]:
    return divisors(math.gcd(shape.heads, shape.widths))


def _from_two(degrees: list[int], limit: int) -> list[int]:
    return [degree for degree in degrees if 2 <= degree <= limit]


def _listed(degrees: list[int]) -> str:
    return ", ".join(map(str, degrees[:-1])) + f" or {degrees[-1]}" if len(degrees) > 1 else str(degrees[0])


def _split_widths(transformer: nn.Module) -> Iterator[int]:
    """Yield the widths that tensor parallelism splits: outputs of column linears, inputs of row linears.

    For convolutions over tokens, these are channels or groups.
    """
    from vllm.model_executor.layers.linear import ColumnParallelLinear, MergedColumnParallelLinear, RowParallelLinear

    from port_kit.parallel.token_conv import TokenConv

    for module in transformer.modules():
        if isinstance(module, TokenConv):
            if module.split_channels is not None:
                yield module.split_channels
        elif isinstance(module, RowParallelLinear):
            yield module.input_size
        elif isinstance(module, MergedColumnParallelLinear):
            yield from module.output_sizes
        elif isinstance(module, ColumnParallelLinear):
            yield module.output_size


def _split_parameters(transformer: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the parameters that tensor parallelism splits: those of column layers, and weights of row layers."""
    from vllm.model_executor.layers.linear import ColumnParallelLinear, RowParallelLinear

    from port_kit.parallel.token_conv import TokenConv

    for module in transformer.modules():
        conv = isinstance(module, TokenConv)
        if isinstance(module, ColumnParallelLinear) or (conv and module.role in ("column", "grouped")):
            yield from module.parameters(recurse=False)
        elif isinstance(module, RowParallelLinear) or (conv and module.role == "row"):
            yield module.weight


def _largest_block(transformer: nn.Module) -> int:
    conditions = getattr(transformer, "_hsdp_shard_conditions", None) or ()
    blocks = (
        module
        for name, module in transformer.named_modules()
        if any(condition(name, module) for condition in conditions)
    )
    return max((sum(map(_bytes, block.parameters())) for block in blocks), default=0)


def _bytes(parameter: nn.Parameter) -> int:
    return parameter.numel() * parameter.element_size()
