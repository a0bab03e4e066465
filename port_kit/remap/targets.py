"""The tensors of a module that a checkpoint has to fill: whole shapes, fused slots, and this rank's part of each.

vLLM's parallel linears are recognised by what they have, not by their class, so that this needs no vLLM and works for
classes derived from them. A parameter that is sharded in a way of its own may say its whole shape in ``full_shape``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

from port_kit.manifest import TensorSpec
from port_kit.remap.boxes import Box, Shape, extents, whole

if TYPE_CHECKING:
    from torch import Tensor, nn

Loader = Callable[..., None]


class Shard(NamedTuple):
    """One slot of a parameter (the whole of it, slot ``""``, where it is not fused).

    Attributes:
        box: the slot in the whole parameter.
        held: the part of the whole parameter that this rank holds of the slot.
        local: where that part stands in this rank's tensor; empty where only the parameter's own loader knows.
    """

    slot: str
    box: Box
    held: Box
    local: Box


class Target(NamedTuple):
    """One parameter or buffer of a module.

    Attributes:
        tensor: the parameter or buffer itself; never read, only written.
        spec: whole shape, dtype and slots; targets of a module that are alike share one object, as they do
            ``shards``.
        shards: the slots with this rank's part of each; empty where only the parameter's own loader knows them.
        loader: the parameter's ``weight_loader``, or None.
        padding: the boxes of this rank's tensor that no checkpoint fills and that are zero: rows that pad a vocabulary.
    """

    name: str
    tensor: Tensor
    spec: TensorSpec
    shards: tuple[Shard, ...]
    loader: Loader | None
    padding: tuple[Box, ...] = ()

    def load(self, slot: str, piece: Tensor) -> None:
        """Give one whole slot to the parameter's loader."""
        assert self.loader is not None
        if not slot:
            self.loader(self.tensor, piece)
        elif "." in slot:
            expert, _, part = slot.partition(".")
            self.loader(self.tensor, piece, self.name, shard_id=part, expert_id=int(expert))
        else:
            self.loader(self.tensor, piece, int(slot) if slot.isdigit() else slot)


@dataclass(frozen=True)
class Targets:
    """All targets of a module by name, the second names of tensors that it shares, and its tensor-parallel size."""

    targets: dict[str, Target]
    aliases: dict[str, str]
    ranks: int


def read_targets(module: nn.Module) -> Targets:
    """List a module's parameters and persistent buffers."""
    targets: dict[str, Target] = {}
    aliases: dict[str, str] = {}
    known: dict[int, str] = {}
    alike: dict[object, Any] = {}
    ranks = 1
    for path, owner in module.named_modules():
        ranks = max(ranks, owner.__dict__.get("tp_size") or 1)
        if not owner._parameters and not owner._buffers:
            continue
        prefix = f"{path}." if path else ""
        for leaf, tensor, buffer in _own_tensors(owner):
            name = prefix + leaf
            first = known.setdefault(id(tensor), name)
            if first == name:
                targets[name] = _read_target(name, owner, tensor, buffer, alike)
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


_ABSENT, _UNKNOWN = object(), object()
_NUMBERS = frozenset({int, type(None), type(_ABSENT)})
#: All that a tensor and its owner may tell about its layout, apart from its loader.
_TENSOR_FACTS = ("full_shape", "output_dim", "input_dim", "needs_scalar_to_array", "_load_into_shard_id")
_OWNER_FACTS = (
    *("tp_rank", "tp_size", "input_size", "input_size_per_partition", "output_size", "output_size_per_partition"),
    *("output_sizes", "head_size", "v_head_size", "total_num_heads", "total_num_kv_heads", "num_heads", "num_kv_heads"),
    *("num_kv_head_replicas", "num_embeddings_per_partition", "org_vocab_size", "shard_indices", "moe_config"),
)


def _read_target(name: str, owner: nn.Module, tensor: Tensor, buffer: bool, alike: dict[object, Any]) -> Target:
    """Describe one tensor of the module that owns it; ``alike`` holds what others of the module have."""
    key: object = (tensor.shape, tensor.dtype, buffer, type(tensor))
    plain = not tensor.__dict__ and not hasattr(type(tensor), "weight_loader")  # nothing was set on it
    facts = None if plain else _facts(owner, tensor, alike)
    if not plain:
        key = None if facts is None else (key, facts)
    found = None if key is None else alike.get(key)
    if found is None:
        local = tuple(tensor.shape)
        box = whole(local)
        source: Any = owner if facts is None else _told(facts)
        shape, shards = (local, (Shard("", box, box, box),)) if plain else _layout(source, tensor, local)
        shards = alike.setdefault(("shards", shards), shards)
        slots = {shard.slot: shard.box for shard in shards if shard.slot}
        padding = _padding(shards, local) if not plain and _is_vocabulary(source, tensor) else ()
        found = _spec(alike, shape, tensor, slots, buffer), shards, padding
        if key is not None:
            alike[key] = found
    spec, shards, padding = found
    loader = None if plain or buffer else getattr(tensor, "weight_loader", None)
    return Target(name, tensor, spec, shards, loader, padding)


def _facts(owner: nn.Module, tensor: Tensor, alike: dict[object, Any]) -> tuple[object, ...] | None:
    """What :func:`_layout` goes by where numbers are all of that: the owner's, then the tensor's; else None."""
    simple = alike.get(type(owner))
    if simple is None:
        simple = alike[type(owner)] = _tells_by_instance(type(owner))
    loader = getattr(tensor, "weight_loader", _ABSENT)
    lender = getattr(loader, "__self__", None)
    if not simple or lender is not None and lender is not owner:
        return None
    held = owner.__dict__
    facts = [held.get(name, _ABSENT) for name in _OWNER_FACTS]
    facts += [getattr(tensor, name, _ABSENT) for name in _TENSOR_FACTS]
    if not _NUMBERS.issuperset(map(type, facts)):
        facts = [_frozen(fact) for fact in facts]
        if _UNKNOWN in facts:
            return None
    return (*facts, loader is _ABSENT, lender is None)


def _told(facts: tuple[object, ...]) -> SimpleNamespace:
    """An owner that tells nothing but these facts."""
    told = zip(_OWNER_FACTS, facts, strict=False)
    return SimpleNamespace(**{name: fact for name, fact in told if fact is not _ABSENT})


def _frozen(fact: object) -> object:
    """A number, or several, as something that can be compared later."""
    if isinstance(fact, (list, tuple)) and all(type(number) is int for number in fact):
        return tuple(fact)
    return fact if type(fact) in _NUMBERS else _UNKNOWN


def _tells_by_instance(kind: type[nn.Module]) -> bool:
    """Whether what a module tells of layouts is found among its own attributes, and nowhere else."""
    from torch import nn

    return kind.__getattr__ is nn.Module.__getattr__ and not any(hasattr(kind, name) for name in _OWNER_FACTS)


def _spec(alike: dict[object, Any], shape: Shape, tensor: Tensor, slots: Mapping[str, Box], buffer: bool) -> TensorSpec:
    key = (shape, tensor.dtype, buffer, tuple(slots.items()))
    spec: TensorSpec | None = alike.get(key)
    if spec is None:
        dtype = str(tensor.dtype).removeprefix("torch.")
        spec = alike[key] = TensorSpec(shape, dtype, slots=slots, buffer=buffer)
    return spec


def _layout(owner: nn.Module, tensor: Tensor, local: Shape) -> tuple[Shape, tuple[Shard, ...]]:
    """The whole shape and the shards of a parameter."""
    full = getattr(tensor, "full_shape", None)
    if full is not None:
        return tuple(full), ()
    if _is_vocabulary(owner, tensor):
        return _vocabulary(owner, local)
    if getattr(owner, "moe_config", None) is not None and len(local) == 3:
        experts = _experts(owner, tensor, local)
        if experts is not None:
            return experts
    lender = _laid_out_by(owner, tensor)
    slots = _fused_slots(lender, tensor, local) or _scale_slots(lender, tensor, local)
    if slots is not None:
        return slots
    return _linear(owner, tensor, local)


def _laid_out_by(owner: nn.Module, tensor: Tensor) -> Any:
    """The linear whose slots a parameter has: its owner, or the one whose loader a second set of weights borrows."""
    lender = getattr(getattr(tensor, "weight_loader", None), "__self__", None)
    alike = lender is not None and getattr(lender, "output_size", None) == getattr(owner, "output_size", "none")
    return lender if alike and _fused_parts(owner) is None else owner


def _linear(owner: nn.Module, tensor: Tensor, local: Shape) -> tuple[Shape, tuple[Shard, ...]]:
    """A column- or row-parallel linear: one axis is this rank's share of the whole.

    Anything else that brings its own loader gets no shards: only that loader knows what it does.
    """
    known = hasattr(owner, "output_size") and (hasattr(tensor, "output_dim") or hasattr(tensor, "input_dim"))
    if not known and hasattr(tensor, "weight_loader"):
        return local, ()
    full, held = list(local), list(whole(local))
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
    return shape, (Shard("", whole(shape), tuple(held), whole(local)),)


def _fused_slots(owner: nn.Module, tensor: Tensor, local: Shape) -> tuple[Shape, tuple[Shard, ...]] | None:
    """A fused column-parallel linear: one slot a projection, each split over the ranks on its own."""
    axis = getattr(tensor, "output_dim", None)
    parts = _fused_parts(owner)
    if axis is None or parts is None:
        return None
    local_total = sum(part.local for part in parts)
    if not local_total or local[axis] % local_total and local_total % local[axis]:
        return None
    # a packed parameter (several values an element) has its slots in proportion
    scale = local[axis] / local_total
    full_total = sum(part.full for part in parts)
    shape = (*local[:axis], round(full_total * scale), *local[axis + 1 :])
    shards, at, local_at = [], 0, 0
    for part in parts:
        size, mine = round(part.full * scale), round(part.local * scale)
        start = at + part.index * mine
        shards.append(
            Shard(
                part.slot,
                _span(shape, axis, at, at + size),
                _span(shape, axis, start, start + mine),
                _span(local, axis, local_at, local_at + mine),
            )
        )
        at, local_at = at + size, local_at + mine
    return shape, tuple(shards)


def _scale_slots(owner: nn.Module, tensor: Tensor, local: Shape) -> tuple[Shape, tuple[Shard, ...]] | None:
    """The scales of a fused linear whose projections are quantized each by itself: one value a slot, on every rank."""
    by_slot = hasattr(tensor, "_load_into_shard_id") or getattr(tensor, "needs_scalar_to_array", False)
    parts = _fused_parts(owner) if by_slot else None
    if parts is None or local != (len(parts),):
        return None
    boxes = [((at, at + 1),) for at in range(len(parts))]
    return local, tuple(Shard(part.slot, box, box, box) for part, box in zip(parts, boxes, strict=True))


@dataclass(frozen=True)
class _Part:
    """One projection of a fused linear: extents in values, and which of its parts this rank holds."""

    slot: str
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
    """Whether the rows are words (a packed embedding has others, and the scales of one have none)."""
    words = getattr(owner, "num_embeddings_per_partition", None)
    known = hasattr(owner, "org_vocab_size") and hasattr(owner, "shard_indices")
    return known and getattr(tensor, "output_dim", None) == 0 and tuple(tensor.shape[:1]) == (words,)


def _padding(shards: tuple[Shard, ...], local: Shape) -> tuple[Box, ...]:
    """The rows after those of the words."""
    stop = shards[0].local[0][1]
    return (((stop, local[0]), *whole(local[1:])),) if stop < local[0] else ()


def _vocabulary(owner: Any, local: Shape) -> tuple[Shape, tuple[Shard, ...]]:
    """A vocabulary split over the ranks and padded: the checkpoint has the words alone."""
    shape = (owner.org_vocab_size, *local[1:])
    start, stop = owner.shard_indices.org_vocab_start_index, owner.shard_indices.org_vocab_end_index
    held = ((start, stop), *whole(local[1:]))
    return shape, (Shard("", whole(shape), held, ((0, stop - start), *whole(local[1:]))),)


def _experts(owner: Any, tensor: Tensor, local: Shape) -> tuple[Shape, tuple[Shard, ...]] | None:
    """vLLM's fused experts: slots ``expert.w1``, ``expert.w3`` (halves of ``w13``) and ``expert.w2``."""
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
    # spread over ranks by expert, quantized or turned: only the layer's own loader knows what this rank holds
    known = total == local[0] and getattr(owner, "quant_config", None) is None and not hasattr(tensor, "is_transposed")
    rows, own = shape[1] // len(halves), local[1] // len(halves)
    shards = []
    for expert in range(total):
        one = (expert, expert + 1)
        for number, half in enumerate(halves):
            top = number * rows
            box = (one, (top, top + rows), (0, shape[2]))
            mine = rank * local[2] if half == "w2" and ranks > 1 else 0
            start = top + rank * own if half != "w2" else 0
            held = (one, (start, start + own), (mine, mine + local[2]))
            here = (one, (number * own, (number + 1) * own), (0, local[2]))
            shards.append(Shard(f"{expert}.{half}", box, held if known else box, here if known else ()))
    return shape, tuple(shards)


def _span(shape: Shape, axis: int, start: int, stop: int) -> Box:
    return (*whole(shape[:axis]), (start, stop), *whole(shape[axis + 1 :]))


def slot_shape(target: Target, slot: str) -> Shape:
    """The shape of one slot in a checkpoint."""
    return extents(target.spec.slots[slot]) if slot else target.spec.shape


def is_elastic(target: Target) -> bool:
    """Whether only the parameter's own loader knows how its whole shape relates to this rank's tensor."""
    return target.loader is not None and not target.shards and math.prod(target.spec.shape) > 0
