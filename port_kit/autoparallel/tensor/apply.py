"""Application of a plan's tensor parallelism to a module, on this rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from port_kit.autoparallel.plan import ChannelRule, Plan, TablePlan, UnitGroup, find, find_linears
from port_kit.autoparallel.tensor.divided import divide_attribute
from port_kit.autoparallel.tensor.layers import ShardedConv, ShardedNorm, local_part
from port_kit.autoparallel.tensor.sizes import evaluate
from port_kit.autoparallel.tree import Arguments, rebuild
from port_kit.errors import ParallelError
from port_kit.parallel import linear
from port_kit.parallel.linear import tp_rank_and_size
from port_kit.parallel.sharded_parameter import sharded_parameter

if TYPE_CHECKING:
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

#: Sizes of consecutive parts of a dimension, each of which is split over the ranks.
Parts = tuple[int, ...]


@dataclass
class Applied:
    """Changes that a plan made in a module.

    Attributes:
        ranks: tensor-parallel size.
        parts: dimension and parts of each parameter that is split, by its name.
    """

    ranks: int
    parts: dict[str, tuple[int, Parts]] = field(default_factory=dict)


def apply_tensor_parallelism(
    module: nn.Module, plan: Plan, *, quant: QuantizationConfig | None = None, prefix: str = ""
) -> Applied:
    """Replace linears and norms, shard parameters, and divide numbers, for this rank of the tensor-parallel group.

    New parameters are uninitialized; load them with the rules of
    :func:`~port_kit.autoparallel.tensor.weights.weight_rules`. A no-op for one rank.

    Args:
        module: unmodified module; its parameters may be on the meta device.
        plan: plan of the module's class.
        quant: quantization of the new linears.
        prefix: path of the module in the pipeline.

    Raises:
        ParallelError: ``plan_degree``; the ranks do not divide a number of units. ``plan_pattern`` and
            ``plan_expression``; the plan is that of another class.
    """
    rank, ranks = tp_rank_and_size()
    applied = Applied(ranks)
    if ranks == 1:
        return applied
    _refuse(plan)
    sizes = UnitSizes(module, plan)
    for unit in plan.units:
        sizes.check(unit, ranks)
    tables = [(entry, paths, _parts_of_table(module, entry, paths, sizes)) for entry, paths in _tables(module, plan)]
    _replace_linears(module, plan, sizes, applied, quant, prefix)
    for norm in plan.norms:
        for path, child in find(module, norm.module).items():
            parts = sizes.parts(path, norm.channels, child.weight.shape[0] if _has(child, "weight") else None)
            _put(module, path, ShardedNorm(child, norm.kind, rank, ranks))
            applied.parts |= {f"{path}.{name}": (0, parts) for name in ("weight", "bias") if _has(child, name)}
    for entry, paths, parts_of in tables:
        for path in paths:
            _slice_table(module.get_submodule(path), path, entry, parts_of[path], applied, rank)
    for value in plan.divided:
        for path, child in find(module, value.module).items():
            divide_attribute(child, path, value, ranks, code="plan_degree", degree="tensor-parallel")
    return applied


def _has(module: nn.Module, name: str) -> bool:
    return getattr(module, name, None) is not None


def _refuse(plan: Plan) -> None:
    if not plan.linears:
        reasons = (
            "; ".join(r.reason for r in plan.refused if r.kind == "tensor") or "it has no linears that can be split"
        )
        raise ParallelError(
            f"{plan.module_class} cannot be split over tensor-parallel ranks: {reasons}",
            code="plan_refused",
            hint="use sequence parallelism or HSDP for this module",
        )


class UnitSizes:
    """Numbers of units and sizes of parts, evaluated on the unmodified blocks.

    Args:
        module: unmodified module.
        plan: its plan.
    """

    def __init__(self, module: nn.Module, plan: Plan) -> None:
        self.units: dict[str, UnitGroup] = {unit.name: unit for unit in plan.units}
        self.blocks = {unit.block: find(module, unit.block) for unit in plan.units}
        self._known: dict[tuple[str, str], int] = {}
        channels = [entry.channels for entry in plan.linears] + [entry.channels for entry in plan.norms]
        rules = [rule for each in (*channels, *(entry.channels for entry in plan.tables)) for rule in each]
        for rule in rules:
            for path, block in self.blocks[self.units[rule.units].block].items() if rule.size else ():
                if self._has(block, rule.size):
                    self._known[path, rule.size] = evaluate(rule.size, block)

    @staticmethod
    def _has(block: nn.Module, expression: str) -> bool:
        """Return True if a block has the attributes; kinds of blocks of one list may lack some."""
        try:
            evaluate(expression, block)
        except ParallelError:
            return False
        return True

    def check(self, unit: UnitGroup, ranks: int) -> None:
        """Check that the ranks divide the units of every block; raises ``plan_degree``."""
        for path, block in self.blocks[unit.block].items():
            if not self._has(block, unit.count):
                continue
            count = evaluate(unit.count, block)
            if count % ranks:
                raise ParallelError(
                    f"{path}: {ranks} tensor-parallel ranks do not divide the {count} units of {unit.name}.",
                    code="plan_degree",
                    hint=f"use a tensor-parallel size that divides {count}",
                    count=count,
                    ranks=ranks,
                )

    def parts(self, path: str, rules: Sequence[ChannelRule], extent: int | None) -> Parts:
        """Return the sizes of the parts of a dimension.

        Args:
            path: path of the module that has the dimension.
            rules: rules of the dimension.
            extent: its size; None if it is not known, for one rule.

        Raises:
            ParallelError: ``plan_expression``; the parts do not add up to the dimension.
        """
        if len(rules) == 1 and not rules[0].size:
            count = rules[0].repeat
            return ((extent or count) // count,) * count
        block = self._block(path, rules[0])
        sizes = [self._known[block, rule.size] for rule in rules for _ in range(rule.repeat)]
        if extent is not None and sum(sizes) != extent:
            raise ParallelError(
                f"{path}: the parts {sizes} do not add up to {extent} channels.",
                code="plan_expression",
                hint="infer the plan from this class: port-kit plan infer CLASS -o FILE",
            )
        return tuple(sizes)

    def _block(self, path: str, rule: ChannelRule) -> str:
        blocks = self.blocks[self.units[rule.units].block]
        return next(block for block in blocks if f"{path}.".startswith(f"{block}."))


def _replace_linears(
    module: nn.Module, plan: Plan, sizes: UnitSizes, applied: Applied, quant: Any, prefix: str
) -> None:
    rank, ranks = tp_rank_and_size()
    for entry in plan.linears:
        for path, child in find_linears(module, entry).items():
            inside = entry.role == "row"
            extent = child.weight.shape[1 if inside else 0]
            if entry.role == "gathered" and extent % ranks:
                continue
            parts = (extent,) if entry.role == "gathered" else sizes.parts(path, entry.channels, extent)
            if isinstance(child, nn.Linear):
                _put(module, path, _parallel_linear(child, entry.role, quant, f"{prefix}.{path}".lstrip(".")))
            else:
                _put(module, path, ShardedConv(child, entry.role, parts, rank, ranks))
            applied.parts[f"{path}.weight"] = (int(inside), parts)
            if child.bias is not None and not inside:
                applied.parts[f"{path}.bias"] = (0, parts)


def _parallel_linear(plain: nn.Linear, role: str, quant: Any, prefix: str) -> nn.Module:
    """Build vLLM's linear with the device and dtype of the plain one."""
    sizes, bias = (plain.in_features, plain.out_features), plain.bias is not None
    before = torch.get_default_dtype()
    torch.set_default_dtype(plain.weight.dtype)
    try:
        with torch.device(plain.weight.device):
            if role == "row":
                layer: nn.Module = linear.row(*sizes, quant, prefix, bias=bias)
            else:
                layer = linear.column(*sizes, quant, prefix, gather=role == "gathered", bias=bias)
            if role != "column":
                linear.use_peer_memory(layer)
    finally:
        torch.set_default_dtype(before)
    layer.in_features, layer.out_features = sizes  # type: ignore[assignment]  # what code may read from nn.Linear
    return layer


def _put(module: nn.Module, path: str, child: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    child.train(module.training)
    setattr(module.get_submodule(parent), name, child)


def _tables(module: nn.Module, plan: Plan) -> list[tuple[TablePlan, list[str]]]:
    return [(entry, list(find(module, entry.module))) for entry in plan.tables]


def _parts_of_table(
    module: nn.Module, entry: TablePlan, paths: Sequence[str], sizes: UnitSizes
) -> dict[str, Parts | None]:
    """Return the parts of a parameter's dimension, before anything is replaced; None for arguments of one rule."""
    found: dict[str, Parts | None] = {}
    for path in paths:
        if entry.kind == "parameter":
            extent: int | None = module.get_submodule(path).get_parameter(entry.path).shape[entry.dim]
            found[path] = sizes.parts(path, entry.channels, extent)
        elif len(entry.channels) == 1 and not entry.channels[0].size:
            found[path] = None
        else:
            found[path] = sizes.parts(path, entry.channels, None)
    return found


def _slice_table(
    owner: nn.Module, path: str, entry: TablePlan, parts: Parts | None, applied: Applied, rank: int
) -> None:
    if entry.kind == "argument":
        repeat = entry.channels[0].repeat
        hook = _ArgumentSlicer(entry.path, entry.dim, parts, repeat, rank, applied.ranks)
        owner.register_forward_pre_hook(hook, with_kwargs=True)
        return
    assert parts is not None
    whole = owner.get_parameter(entry.path)
    setattr(owner, entry.path, sharded_parameter(whole, entry.dim, rank, applied.ranks))
    applied.parts[f"{path}.{entry.path}" if path else entry.path] = (entry.dim, parts)


@dataclass(frozen=True)
class _ArgumentSlicer:
    """Forward pre-hook that replaces an argument by this rank's part."""

    path: str
    dim: int
    parts: Parts | None
    repeat: int
    rank: int
    ranks: int

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        def change(path: str, x: Any) -> Any:
            return self._own(x) if path == self.path and torch.is_tensor(x) else x

        names = Arguments(module)
        return names.split(rebuild(names.named(args, kwargs), change), args)

    def _own(self, x: Tensor) -> Tensor:
        parts = self.parts or (x.shape[self.dim] // self.repeat,) * self.repeat
        return local_part(x, self.dim, parts, self.rank, self.ranks)
