"""Recording of a rank's work: attention calls, collectives, parameters and branches.

Equal results do not prove sharding: with a plan that matches no module, each rank computes everything and the result is
correct. Call :func:`install` before the model is built and :func:`collect` after it ran.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from port_kit.parallel.comm.symm_mem import transfer_stats
from port_kit.upstream.checks import require

require("dispatch_mode")

Noted = TypeVar("Noted")

#: Maximum number of recorded calls per attention layer and per boundary.
KEPT_CALLS = 4096
#: Maximum number of branches whose inputs and flows are recorded.
KEPT_BRANCHES = 64
#: Maximum number of branches whose module outputs are recorded, if requested.
KEPT_OUTPUTS = 16


@dataclass(frozen=True)
class AttentionCall:
    """One call of an attention layer on this rank.

    Attributes:
        query: number of query tokens in the layer's input.
        key: number of key tokens in the layer's input.
        seen: number of keys that the kernel attended to, over all ranks.
        exchanged: True if the layer used sequence parallelism.
        branch: index of the transformer call, from 0.
    """

    query: int
    key: int
    seen: int
    exchanged: bool
    branch: int


@dataclass(frozen=True)
class BoundaryCall:
    """One call of a sequence-parallel boundary on this rank.

    Attributes:
        tokens: tokens of each tensor in the sharded region, with padding.
        branch: index of the transformer call, from 0.
    """

    tokens: tuple[int, ...]
    branch: int


@dataclass(frozen=True)
class Trace:
    """Record of one rank's work.

    Attributes:
        rank_coords: this rank's rank in each group: ``tp``, ``sequence``, ``cfg``.
        attention: calls by layer path.
        boundaries: calls by path of the :class:`~port_kit.parallel.sequence.SPBoundary`.
        collectives: ``{operator: (calls, bytes)}``; ``symm_mem`` counts transfers of that module.
        parameters: ``{path: (local shape, local bytes)}`` of the transformers.
        calls: number of branches that the transformers ran.
        branches: fingerprints of the inputs of the first branches, in order.
        flows: transformer outputs of these branches.
        outputs: module outputs of the first branches, ``(path, branch, tensor)`` in order of computation; empty unless
            requested.
    """

    rank_coords: Mapping[str, int]
    attention: Mapping[str, list[AttentionCall]]
    boundaries: Mapping[str, list[BoundaryCall]]
    collectives: Mapping[str, tuple[int, int]]
    parameters: Mapping[str, tuple[tuple[int, ...], int]]
    calls: int
    branches: list[tuple[float, ...]]
    flows: list[tuple[Tensor, ...]]
    outputs: list[tuple[str, int, Tensor]] = field(default_factory=list)

    @property
    def parameter_bytes(self) -> int:
        """Bytes of transformer parameters on this rank."""
        return sum(size for _, size in self.parameters.values())


class _Recorder(TorchDispatchMode):
    """Recorder of a process: a dispatch mode for collectives, module hooks for everything else."""

    def __init__(self, keep_outputs: bool) -> None:
        super().__init__()
        self.keep_outputs = keep_outputs
        self.calls: dict[int, list[AttentionCall]] = defaultdict(list)
        self.boundary_calls: dict[int, list[BoundaryCall]] = defaultdict(list)
        self.open: list[tuple[int, int, int]] = []  # id, query and key tokens of running attentions
        self.seen: int | None = None
        self.collectives: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.transformer_calls = 0
        self.branches: list[tuple[float, ...]] = []
        self.flows: list[tuple[Tensor, ...]] = []
        self.outputs: list[tuple[int, int, Tensor]] = []
        self.new_calls: list[tuple[int, AttentionCall]] = []  # all three since the last transformer call
        self.new_boundary_calls: list[tuple[int, BoundaryCall]] = []
        self.new_outputs: list[tuple[int, Tensor]] = []

    def start(self) -> None:
        """Record until the process ends."""
        register_module_forward_pre_hook(self.before)
        register_module_forward_hook(self.after, with_kwargs=True)
        self.watch_kernels()
        self.__enter__()

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Record an attention's input sizes and the start of a transformer call."""
        from vllm_omni.diffusion.attention.layer import Attention

        if is_transformer(module):
            self.number(branches=1)
        if isinstance(module, Attention):
            self.open.append((id(module), args[0].shape[1], args[1].shape[1]))
            self.seen = None

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        """Record calls of attentions and boundaries, transformer inputs and outputs, and requested module outputs."""
        from vllm_omni.diffusion.attention.layer import Attention

        from port_kit.parallel.sequence import TOKENS, SPBoundary

        if isinstance(module, Attention):
            key, query, keys = self.open.pop()
            exchanged = module._get_active_parallel_strategy() is not module._no_parallel_strategy
            self.new_calls.append((key, AttentionCall(query, keys, self.seen or keys, exchanged, 0)))
        if isinstance(module, SPBoundary):
            # one of the two sides is sharded: the input of a boundary that gathers, the output of one that shards
            tokens = tuple(min(x.shape[TOKENS], y.shape[TOKENS]) for x, y in zip(args, output, strict=True))
            self.new_boundary_calls.append((id(module), BoundaryCall(tokens, 0)))
        self.keep_output(module, output)
        if is_transformer(module):
            self.note_branches(
                (*args, *(value for name, value in kwargs.items() if name != "extra_branches")), kwargs, output
            )

    def note_branches(self, first: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        """Record the branches of one transformer call."""
        extra_branches = kwargs.get("extra_branches", ())
        given = [first, *(tuple(other.values()) for other in extra_branches)]
        for inputs, flows in zip(given, output if extra_branches else [output], strict=True):
            if len(self.branches) < KEPT_BRANCHES:
                self.branches.append(_fingerprint(inputs))
                self.flows.append(tuple(map(_copy, _tensors(flows))))
        self.number(len(given))
        self.transformer_calls += len(given)

    def number(self, branches: int) -> None:
        """Assign the attention calls and outputs since the last transformer call to branches.

        Each module runs the branches in order.
        """
        for key, place, call in _divided(self.new_calls, branches):
            if len(self.calls[key]) < KEPT_CALLS:
                self.calls[key].append(replace(call, branch=self.transformer_calls + place))
        for key, place, boundary_call in _divided(self.new_boundary_calls, branches):
            if len(self.boundary_calls[key]) < KEPT_CALLS:
                self.boundary_calls[key].append(replace(boundary_call, branch=self.transformer_calls + place))
        for key, place, value in _divided(self.new_outputs, branches):
            self.outputs.append((key, self.transformer_calls + place, value))
        self.new_calls.clear()
        self.new_boundary_calls.clear()
        self.new_outputs.clear()

    def keep_output(self, module: nn.Module, output: Any) -> None:
        """Record a module's output, except for fused projections, whose shards interleave."""
        from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear

        if not self.keep_outputs or self.transformer_calls >= KEPT_OUTPUTS:
            return
        if not isinstance(module, (MergedColumnParallelLinear, QKVParallelLinear)):
            self.new_outputs += [(id(module), _copy(value)) for value in _tensors(output)]

    def watch_kernels(self) -> None:
        """Record the number of keys in the kernel's input, after exchange and trimming."""
        from vllm_omni.diffusion.attention.layer import Attention
        from vllm_omni.diffusion.attention.parallel.ring import RingParallelAttention

        from port_kit.parallel.comm.fused_sequence_parallel import FusedRing

        local = Attention._run_local_attention

        def run_local(layer: Any, query: Tensor, key: Tensor, value: Tensor, metadata: Any) -> Tensor:
            self.seen = key.shape[1]
            return local(layer, query, key, value, metadata)

        Attention._run_local_attention = run_local
        for kind in (RingParallelAttention, FusedRing):
            kind.run_attention = self.watched_ring(kind.run_attention)  # type: ignore[method-assign]

    def watched_ring(self, run: Any) -> Any:
        """Wrap a Ring ``run_attention`` to record the number of keys over all ranks."""

        def run_ring(ring: Any, query: Tensor, key: Tensor, value: Tensor, metadata: Any, **options: Any) -> Tensor:
            total = key.shape[1] * ring._sp_group.ring_world_size
            valid = metadata.extra.get("valid_kv_length") if metadata is not None else None
            self.seen = total if valid is None else min(total, valid)
            return run(ring, query, key, value, metadata, **options)

        return run_ring

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count communication operators and the bytes of their tensor arguments."""
        name = func.name()
        if name.startswith(("c10d::", "_c10d_functional::")) or "shm_all" in name or "shm_gather" in name:
            short = name.partition("::")[2].rstrip("_")
            self.collectives[short] += 1
            self.bytes[short] += _bytes_of(args)
        return func(*args, **(kwargs or {}))


_recorder: _Recorder | None = None


def install(*, keep_outputs: bool = False) -> None:
    """Start recording in this process. Call once, before the model is built."""
    require("attention_layer")
    require("ring_strategy")
    global _recorder
    _recorder = _Recorder(keep_outputs)
    _recorder.start()


def collect(pipeline: nn.Module) -> Trace:
    """Return the record, with module paths relative to the pipeline.

    Raises:
        RuntimeError: :func:`install` was not called.
    """
    if _recorder is None:
        raise RuntimeError("recorder.install() was not called before the model ran")
    paths = {id(module): path for path, module in pipeline.named_modules()}
    _recorder.number(branches=1)
    return Trace(
        rank_coords=_rank_coords(),
        attention={paths[key]: calls for key, calls in _recorder.calls.items() if key in paths},
        boundaries={paths[key]: calls for key, calls in _recorder.boundary_calls.items() if key in paths},
        collectives=_collectives(_recorder),
        parameters=_parameters(pipeline),
        calls=_recorder.transformer_calls,
        branches=_recorder.branches,
        flows=_recorder.flows,
        outputs=[(paths[key], call, value) for key, call, value in _recorder.outputs if key in paths],
    )


def _collectives(recorder: _Recorder) -> dict[str, tuple[int, int]]:
    found = {operator: (calls, recorder.bytes[operator]) for operator, calls in sorted(recorder.collectives.items())}
    if transfer_stats["calls"]:
        found["symm_mem"] = transfer_stats["calls"], transfer_stats["bytes"]
    return found


def is_transformer(module: nn.Module) -> bool:
    """Return True if a module declares ``_hsdp_shard_conditions`` or ``_sp_plan``, as transformers do."""
    return hasattr(type(module), "_hsdp_shard_conditions") or hasattr(type(module), "_sp_plan")


def _divided(noted: list[tuple[int, Noted]], branches: int) -> Iterator[tuple[int, int, Noted]]:
    """Split each module's entries into equal consecutive groups; yield module, group and entry."""
    total = Counter(key for key, _ in noted)
    met: Counter[int] = Counter()
    for key, entry in noted:
        yield key, met[key] * branches // total[key], entry
        met[key] += 1


def _tensors(output: Any) -> list[Tensor]:
    values = output if isinstance(output, (tuple, list)) else (output,)
    return [value for value in values if isinstance(value, Tensor) and value.is_floating_point()]


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().float().cpu().clone()


def _fingerprint(args: tuple[Any, ...]) -> tuple[float, ...]:
    """Return one number per tensor argument; equal inputs have equal numbers."""
    tensors = [getattr(arg, "raw", arg) for arg in args]
    return tuple(float(_weighted_sum(tensor)) for tensor in tensors if isinstance(tensor, Tensor))


def _weighted_sum(tensor: Tensor) -> float:
    flat = tensor.detach().double().flatten()
    weights = torch.arange(1, flat.numel() + 1, dtype=torch.float64, device=flat.device) / max(flat.numel(), 1)
    return (flat * weights).mean().item() if flat.numel() else 0.0


def _bytes_of(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(map(_bytes_of, value)) if isinstance(value, (list, tuple)) else 0


def _parameters(pipeline: nn.Module) -> dict[str, tuple[tuple[int, ...], int]]:
    found = {}
    for path, module in pipeline.named_modules():
        if is_transformer(module):
            for name, parameter in module.named_parameters():
                local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
                found[f"{path}.{name}"] = (tuple(local.shape), local.numel() * local.element_size())
    return found


def _rank_coords() -> dict[str, int]:
    """Return this rank's rank in each group."""
    from vllm.distributed import get_tp_group
    from vllm_omni.diffusion.distributed.parallel_state import get_cfg_group, get_sp_group

    groups = {"tp": get_tp_group(), "sequence": get_sp_group(), "cfg": get_cfg_group()}
    return {kind: group.rank_in_group for kind, group in groups.items()}
