"""Targets of a load: the complete shapes of a module's tensors, their shards, and this rank's part of each.

vLLM's parallel linears are recognized by their attributes, not by their class. So this module needs no vLLM, and
derived classes work. A parameter that is sharded in another way can declare its complete shape in ``full_shape``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from port_kit.manifest import TensorSpec
from port_kit.regions import Region, Shape, full_region, intersection, region_numel, with_span
from port_kit.upstream.checks import require

if TYPE_CHECKING:
    from torch import Tensor, nn

Loader = Callable[..., None]


class Shard(NamedTuple):
    """One shard of a fused parameter, or all of a plain one (with an empty name).

    Attributes:
        name: the ``shard_id``: ``q``, ``0``, ``3.w1``.
        region: the shard in the complete parameter.
        held: the part of the complete parameter that this rank holds of the shard.
        local: that part in this rank's tensor; empty if only the parameter's own loader knows it.
    """

    name: str
    region: Region
    held: Region
    local: Region


class Target(NamedTuple):
    """One parameter or buffer of a module.

    Attributes:
        tensor: the parameter or buffer; only written.
        spec: complete shape, dtype and shards.
        shards: the shards with this rank's part of each; None if only the parameter's own loader knows them.
        loader: the parameter's ``weight_loader``, or None.
        padding: regions of this rank's tensor that no checkpoint fills and that are zero, such as a padded vocabulary.
    """

    name: str
    tensor: Tensor
    spec: TensorSpec
    shards: tuple[Shard, ...] | None
    loader: Loader | None
    padding: tuple[Region, ...] = ()

    @property
    def memory(self) -> Tensor:
        """Tensor in this rank's memory; the local shard of an FSDP parameter."""
        tensor: Any = self.tensor
        memory: Tensor = tensor.to_local() if _is_dtensor(tensor) else tensor.data
        return memory

    @property
    def is_opaque(self) -> bool:
        """Return True if only the parameter's own loader knows how its complete shape relates to this rank's tensor."""
        return self.loader is not None and self.shards is None and math.prod(self.spec.shape) > 0

    @property
    def is_described(self) -> bool:
        """Return True if the shards describe every element of this rank's memory."""
        if self.shards is None or not all(len(shard.local) == self.tensor.dim() for shard in self.shards):
            return False
        local = [*(shard.local for shard in self.shards), *self.padding]
        return sum(map(region_numel, local)) == self.memory.numel()

    def load(self, shard: str, value: Tensor) -> None:
        """Load one complete shard through the parameter's loader."""
        assert self.loader is not None
        if not shard:
            self.loader(self.tensor, value)
        elif "." in shard:
            expert, _, part = shard.partition(".")
            self.loader(self.tensor, value, self.name, shard_id=part, expert_id=int(expert))
        else:
            self.loader(self.tensor, value, int(shard) if shard.isdigit() else shard)


@dataclass(frozen=True)
class Targets:
    """All targets of a module by name, further names of shared tensors, and the tensor-parallel size."""

    targets: dict[str, Target]
    aliases: dict[str, str]
    ranks: int

    @property
    def opaque(self) -> tuple[frozenset[str], int]:
        """The opaque targets and the tensor-parallel size, for :class:`~port_kit.remap.resolve.Resolver`."""
        return frozenset(name for name, target in self.targets.items() if target.is_opaque), self.ranks


def read_targets(module: nn.Module) -> Targets:
    """List the parameters and persistent buffers of a module."""
    targets: dict[str, Target] = {}
    aliases: dict[str, str] = {}
    known: dict[int, str] = {}
    alike: dict[object, Target] = {}
    ranks = 1
    for path, owner in module.named_modules(remove_duplicate=False):
        ranks = max(ranks, owner.__dict__.get("tp_size") or 1)
        for leaf, tensor, buffer in _own_tensors(owner):
            name = f"{path}.{leaf}" if path else leaf
            first = known.setdefault(id(tensor), name)
            if first == name:
                key = _layout_key(owner, leaf, tensor, buffer)
                like = alike.get(key) or alike.setdefault(key, _read_target(name, owner, tensor, buffer))
                loader: Any = None if like.loader is None else getattr(tensor, "weight_loader", None)
                targets[name] = Target(name, tensor, like.spec, like.shards, loader, like.padding)
            else:
                aliases[name] = first
    return Targets(targets, aliases, ranks)


def _own_tensors(owner: nn.Module) -> Iterator[tuple[str, Tensor, bool]]:
    for leaf, parameter in owner._parameters.items():
        if parameter is not None:
            yield leaf, parameter, False
    for leaf, buffer in owner._buffers.items():
        if buffer is not None and leaf not in owner._non_persistent_buffers_set:
            yield leaf, buffer, True


#: Attributes of an owner that determine the layout of its tensors.
_OWNER_FACTS = (
    *("tp_rank", "tp_size", "input_size", "input_size_per_partition", "output_size", "output_size_per_partition"),
    *("output_sizes", "head_size", "v_head_size", "total_num_heads", "total_num_kv_heads", "num_heads", "num_kv_heads"),
    *("num_kv_head_replicas", "num_embeddings_per_partition", "org_vocab_size", "shard_indices", "moe_config"),
    *("global_num_experts", "quant_config"),
)


def _is_plain(tensor: Tensor) -> bool:
    """Return True if no attribute of the tensor describes a layout."""
    return not tensor.__dict__ and not hasattr(type(tensor), "weight_loader")


def _layout_key(owner: nn.Module, leaf: str, tensor: Tensor, buffer: bool) -> object:
    """Return a key that tensors of one layout share; it is unique if the tensor may have a layout of its own."""
    if _is_plain(tensor):
        return tensor.shape, tensor.dtype, buffer
    loader = getattr(tensor, "weight_loader", None)
    if _is_dtensor(tensor) or getattr(loader, "__self__", owner) is not owner or not _has_own_facts(type(owner)):  # type: ignore[arg-type]
        return id(tensor)
    told = {name: fact for name, fact in tensor.__dict__.items() if fact is not loader}
    facts = [owner.__dict__.get(name, ...) for name in _OWNER_FACTS]
    values = [tuple(fact) if type(fact) is list else fact for fact in (*facts, *told.values())]
    key = (type(owner), leaf, type(tensor), tensor.shape, tensor.dtype, buffer, loader is None, *told, *values)
    return key if _is_hashable(key) else id(tensor)


def _is_hashable(key: object) -> bool:
    try:
        hash(key)
    except TypeError:
        return False
    return True


@lru_cache
def _has_own_facts(kind: type[nn.Module]) -> bool:
    """Return True if instances of a class hold these attributes themselves, without properties and wrapped modules."""
    from torch import nn

    return kind.__getattr__ is nn.Module.__getattr__ and not any(hasattr(kind, name) for name in _OWNER_FACTS)


def _read_target(name: str, owner: nn.Module, tensor: Tensor, buffer: bool) -> Target:
    local = tuple(tensor.shape)
    region = full_region(local)
    shape: Shape = local
    shards: tuple[Shard, ...] | None = (Shard("", region, region, region),)
    plain = _is_plain(tensor)
    if not plain:
        shape, shards = _layout(owner, tensor, local)
    slots = {shard.name: shard.region for shard in shards or () if shard.name}
    padding = _padding(shards, local) if shards and not plain and _is_vocabulary(owner, tensor) else ()
    if shards is not None and _is_dtensor(tensor):
        shards = _local_rows(tensor, shards)
    spec = TensorSpec(shape, str(tensor.dtype).removeprefix("torch."), slots=slots, buffer=buffer)
    return Target(name, tensor, spec, shards, None if buffer else getattr(tensor, "weight_loader", None), padding)


def _is_dtensor(tensor: Tensor) -> bool:
    return hasattr(tensor, "device_mesh")


def _local_rows(tensor: Any, shards: tuple[Shard, ...]) -> tuple[Shard, ...]:
    """Return the parts of shards that are in this rank's rows of an FSDP parameter, which is split like torch.chunk."""
    rows, mesh = tensor.shape[0], tensor.device_mesh
    start = min(-(-rows // mesh.size(-1)) * mesh.get_local_rank(mesh.ndim - 1), rows)
    mine = with_span(full_region(tuple(tensor.shape)), 0, start, start + tensor.to_local().shape[0])
    found = []
    for shard in shards:
        common = intersection(shard.local, mine)
        if common is not None:
            low, high = common[0]
            first = shard.held[0][0] + low - shard.local[0][0]
            held = with_span(shard.held, 0, first, first + high - low)
            found.append(shard._replace(held=held, local=with_span(common, 0, low - start, high - start)))
    return tuple(found)


def _layout(owner: nn.Module, tensor: Tensor, local: Shape) -> tuple[Shape, tuple[Shard, ...] | None]:
    """Return the complete shape and the shards of a parameter."""
    if type(owner).__module__.startswith("vllm."):
        require("parameter_layout")
    full = getattr(tensor, "full_shape", None)
    if full is not None:
        return tuple(full), None
    if _is_vocabulary(owner, tensor):
        return _vocabulary(owner, local)
    if getattr(owner, "moe_config", None) is not None and len(local) == 3:
        experts = _experts(owner, tensor, local)
        if experts is not None:
            return experts
    lender = _laid_out_by(owner, tensor)
    return _fused(lender, tensor, local) or _scales(lender, tensor, local) or _linear(owner, tensor, local)


def _laid_out_by(owner: nn.Module, tensor: Tensor) -> Any:
    """Return the linear whose shards a parameter has: its owner, or the owner of its loader."""
    lender = getattr(getattr(tensor, "weight_loader", None), "__self__", None)
    alike = lender is not None and getattr(lender, "output_size", None) == getattr(owner, "output_size", "none")
    return lender if alike and _fused_parts(owner) is None else owner


def _linear(owner: nn.Module, tensor: Tensor, local: Shape) -> tuple[Shape, tuple[Shard, ...] | None]:
    """Return the layout of a column- or row-parallel linear; the shards are None if only the loader knows them.

    The loader of an FSDP parameter accepts complete tensors, so the parameter is described like an unsharded one.
    """
    known = hasattr(owner, "output_size") and (hasattr(tensor, "output_dim") or hasattr(tensor, "input_dim"))
    if not known and hasattr(tensor, "weight_loader") and not _is_dtensor(tensor):
        return local, None
    full, held = list(local), list(full_region(local))
    rank = getattr(owner, "tp_rank", 0)
    for axis_name, side in (("output_dim", "output_size"), ("input_dim", "input_size")):
        axis, total = getattr(tensor, axis_name, None), getattr(owner, side, None)
        part = getattr(owner, f"{side}_per_partition", total)
        if axis is None or not isinstance(total, int) or not isinstance(part, int) or not part:
            continue
        count = total // part
        full[axis] = local[axis] * count
        if count > 1:
            held[axis] = (rank * local[axis], (rank + 1) * local[axis])
    shape = tuple(full)
    return shape, (Shard("", full_region(shape), tuple(held), full_region(local)),)


def _fused(owner: nn.Module, tensor: Tensor, local: Shape) -> tuple[Shape, tuple[Shard, ...]] | None:
    """Return the layout of a fused column-parallel linear: one shard per projection, each split over the ranks."""
    axis = getattr(tensor, "output_dim", None)
    parts = _fused_parts(owner)
    if axis is None or parts is None:
        return None
    local_total = sum(part.local for part in parts)
    if not local_total or local[axis] % local_total and local_total % local[axis]:
        return None
    # shards of a packed parameter (several values per element) are scaled
    scale = local[axis] / local_total
    full_total = sum(part.full for part in parts)
    shape = (*local[:axis], round(full_total * scale), *local[axis + 1 :])
    shards, at, local_at = [], 0, 0
    for part in parts:
        size, mine = round(part.full * scale), round(part.local * scale)
        start = at + part.index * mine
        shards.append(
            Shard(
                part.shard,
                with_span(full_region(shape), axis, at, at + size),
                with_span(full_region(shape), axis, start, start + mine),
                with_span(full_region(local), axis, local_at, local_at + mine),
            )
        )
        at, local_at = at + size, local_at + mine
    return shape, tuple(shards)


def _scales(owner: nn.Module, tensor: Tensor, local: Shape) -> tuple[Shape, tuple[Shard, ...]] | None:
    """Return the layout of the scales of a fused linear: one value per projection, on every rank."""
    by_slot = hasattr(tensor, "_load_into_shard_id") or getattr(tensor, "needs_scalar_to_array", False)
    parts = _fused_parts(owner) if by_slot else None
    if parts is None or local != (len(parts),):
        return None
    regions = [((at, at + 1),) for at in range(len(parts))]
    return local, tuple(Shard(part.shard, region, region, region) for part, region in zip(parts, regions, strict=True))


@dataclass(frozen=True)
class _Part:
    """One projection of a fused linear: extents in values, and the index of this rank's part."""

    shard: str
    full: int
    local: int
    index: int


def _fused_parts(owner: Any) -> list[_Part] | None:
    rank, size = getattr(owner, "tp_rank", 0), getattr(owner, "tp_size", 1)
    if hasattr(owner, "total_num_kv_heads") and hasattr(owner, "num_kv_head_replicas"):
        value_size = getattr(owner, "v_head_size", owner.head_size)
        kv_rank = rank // owner.num_kv_head_replicas
        return [
            _Part("q", owner.total_num_heads * owner.head_size, owner.num_heads * owner.head_size, rank),
            _Part("k", owner.total_num_kv_heads * owner.head_size, owner.num_kv_heads * owner.head_size, kv_rank),
            _Part("v", owner.total_num_kv_heads * value_size, owner.num_kv_heads * value_size, kv_rank),
        ]
    sizes = getattr(owner, "output_sizes", None)
    if isinstance(sizes, (list, tuple)) and len(sizes) > 1:
        if not hasattr(owner, "output_size_per_partition"):
            size = 1
        return [_Part(str(slot), full, full // size, rank) for slot, full in enumerate(sizes)]
    return None


def _is_vocabulary(owner: Any, tensor: Tensor) -> bool:
    """Return True if the rows are tokens; those of a packed embedding or of its scales are not."""
    words = getattr(owner, "num_embeddings_per_partition", None)
    known = hasattr(owner, "org_vocab_size") and hasattr(owner, "shard_indices")
    return known and getattr(tensor, "output_dim", None) == 0 and tuple(tensor.shape[:1]) == (words,)


def _padding(shards: tuple[Shard, ...], local: Shape) -> tuple[Region, ...]:
    """Return the rows after those of the vocabulary."""
    stop = shards[0].local[0][1]
    return (((stop, local[0]), *full_region(local[1:])),) if stop < local[0] else ()


def _vocabulary(owner: Any, local: Shape) -> tuple[Shape, tuple[Shard, ...]]:
    """Return the layout of a vocabulary that is split over the ranks and padded; checkpoints have no padding."""
    shape = (owner.org_vocab_size, *local[1:])
    start, stop = owner.shard_indices.org_vocab_start_index, owner.shard_indices.org_vocab_end_index
    held = ((start, stop), *full_region(local[1:]))
    return shape, (Shard("", full_region(shape), held, ((0, stop - start), *full_region(local[1:]))),)


def _experts(owner: Any, tensor: Tensor, local: Shape) -> tuple[Shape, tuple[Shard, ...]] | None:
    """Return the layout of vLLM's fused experts: shards ``expert.w1``, ``expert.w3`` (``w13``) and ``expert.w2``."""
    names = {id(parameter): leaf for leaf, parameter in owner._parameters.items()}
    leaf = names.get(id(tensor), "")
    total = getattr(owner, "global_num_experts", local[0])
    layout = owner if hasattr(owner, "tp_size") else owner.moe_config
    ranks = getattr(layout, "tp_size", 1)
    halves: tuple[str, ...]
    if leaf == "w13_weight":
        shape = (total, local[1] * ranks, local[2])
        halves = ("w1", "w3")
    elif leaf == "w2_weight":
        shape = (total, local[1], local[2] * ranks)
        halves = ("w2",)
    else:
        return None
    rank = getattr(layout, "tp_rank", 0)
    # with expert parallelism, quantization or transposition only the layer's own loader knows the layout
    known = total == local[0] and getattr(owner, "quant_config", None) is None and not hasattr(tensor, "is_transposed")
    rows, own = shape[1] // len(halves), local[1] // len(halves)
    shards = []
    for expert in range(total):
        one = (expert, expert + 1)
        for number, half in enumerate(halves):
            top = number * rows
            region = (one, (top, top + rows), (0, shape[2]))
            mine = rank * local[2] if half == "w2" and ranks > 1 else 0
            start = top + rank * own if half != "w2" else 0
            held = (one, (start, start + own), (mine, mine + local[2]))
            here = (one, (number * own, (number + 1) * own), (0, local[2]))
            shards.append(Shard(f"{expert}.{half}", region, held if known else region, here if known else ()))
    return shape, tuple(shards)
