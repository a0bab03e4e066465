"""What a rank really did: its attention, its collectives, its parameters and its branches, measured while it ran.

Equal results prove nothing about sharding: a model whose plan does not match computes everything on every rank, and
rightly. :func:`install` watches a process from before its model is built; :func:`collect` says what was seen.
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

Noted = TypeVar("Noted")

#: Calls of each attention that are kept.
KEPT_CALLS = 4096
#: Passes whose inputs and flows are kept.
KEPT_BRANCHES = 64
#: Passes of which all modules' outputs are kept, where they are asked for.
KEPT_OUTPUTS = 16


@dataclass(frozen=True)
class AttentionCall:
    """One call of one attention layer on this rank.

    Attributes:
        query: tokens of the query that the layer was given.
        key: tokens of the keys that the layer was given.
        seen: keys that the kernel attended to, of all ranks together.
        exchanged: the layer took part in sequence parallelism.
        branch: which pass of the transformer it was part of, counted from 0.
    """

    query: int
    key: int
    seen: int
    exchanged: bool
    branch: int


@dataclass(frozen=True)
class Trace:
    """What one rank did.

    Attributes:
        rank_coords: this rank's place in each group: ``tp``, ``sequence``, ``cfg``.
        attention: calls by the layer's path.
        collectives: ``{operator: (calls, bytes)}``; ``symm_mem`` are those of :mod:`~port_kit.parallel.comm.symm_mem`.
        parameters: ``{path: (local shape, local bytes)}`` of the transformers.
        calls: how many passes the transformers made.
        branches: a fingerprint of the inputs of the first passes, in order.
        flows: what the transformer gave in these passes.
        outputs: outputs of all modules in the first passes of a transformer, ``(path, pass, tensor)`` in order of
            computation; empty unless asked for.
    """

    rank_coords: Mapping[str, int]
    attention: Mapping[str, list[AttentionCall]]
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
    """Sees everything that a process does; a dispatch mode for its collectives, hooks for the rest."""

    def __init__(self, keep_outputs: bool) -> None:
        super().__init__()
        self.keep_outputs = keep_outputs
        self.calls: dict[int, list[AttentionCall]] = defaultdict(list)
        self.open: list[tuple[int, int, int]] = []  # id, query and key tokens of the attention that is running
        self.seen: int | None = None
        self.collectives: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.transformer_calls = 0
        self.branches: list[tuple[float, ...]] = []
        self.flows: list[tuple[Tensor, ...]] = []
        self.outputs: list[tuple[int, int, Tensor]] = []
        self.new_calls: list[tuple[int, AttentionCall]] = []  # these two since the last call of a transformer
        self.new_outputs: list[tuple[int, Tensor]] = []

    def start(self) -> None:
        """Watch for the life of the process."""
        register_module_forward_pre_hook(self.before)
        register_module_forward_hook(self.after, with_kwargs=True)
        self.watch_kernels()
        self.__enter__()

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Note what an attention is given, and where a transformer begins."""
        from vllm_omni.diffusion.attention.layer import Attention

        if is_transformer(module):
            self.number(branches=1)
        if isinstance(module, Attention):
            self.open.append((id(module), args[0].shape[1], args[1].shape[1]))
            self.seen = None

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        """Note what an attention did, what a transformer was given and gave, and any module's output if asked."""
        from vllm_omni.diffusion.attention.layer import Attention

        if isinstance(module, Attention):
            key, query, keys = self.open.pop()
            exchanged = module._get_active_parallel_strategy() is not module._no_parallel_strategy
            self.new_calls.append((key, AttentionCall(query, keys, self.seen or keys, exchanged, 0)))
        self.keep_output(module, output)
        if is_transformer(module):
            self.note_branches(
                (*args, *(value for name, value in kwargs.items() if name != "extra_branches")), kwargs, output
            )

    def note_branches(self, first: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        """Note the passes of one call of a transformer: one, or several that it was given together."""
        extra_branches = kwargs.get("extra_branches", ())
        given = [first, *(tuple(other.values()) for other in extra_branches)]
        for inputs, flows in zip(given, output if extra_branches else [output], strict=True):
            if len(self.branches) < KEPT_BRANCHES:
                self.branches.append(_fingerprint(inputs))
                self.flows.append(tuple(map(_copy, _tensors(flows))))
        self.number(len(given))
        self.transformer_calls += len(given)

    def number(self, branches: int) -> None:
        """Say of each call and output that was noted since the last time which pass it is of.

        Every module has made its passes one after the other.
        """
        for key, place, call in _divided(self.new_calls, branches):
            if len(self.calls[key]) < KEPT_CALLS:
                self.calls[key].append(replace(call, branch=self.transformer_calls + place))
        for key, place, value in _divided(self.new_outputs, branches):
            self.outputs.append((key, self.transformer_calls + place, value))
        self.new_calls.clear()
        self.new_outputs.clear()

    def keep_output(self, module: nn.Module, output: Any) -> None:
        """Keep what a module gave; but not of fused projections, whose parts interleave over the ranks."""
        from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear

        if not self.keep_outputs or self.transformer_calls >= KEPT_OUTPUTS:
            return
        if not isinstance(module, (MergedColumnParallelLinear, QKVParallelLinear)):
            self.new_outputs += [(id(module), _copy(value)) for value in _tensors(output)]

    def watch_kernels(self) -> None:
        """Note how many keys the kernel is given, after all exchange and trimming."""
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
        """Return a ring's ``run_attention`` that notes how many keys went round."""

        def run_ring(ring: Any, query: Tensor, key: Tensor, value: Tensor, metadata: Any, **options: Any) -> Tensor:
            whole = key.shape[1] * ring._sp_group.ring_world_size
            valid = metadata.extra.get("valid_kv_length") if metadata is not None else None
            self.seen = whole if valid is None else min(whole, valid)
            return run(ring, query, key, value, metadata, **options)

        return run_ring

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count the operators that talk to other ranks, and the bytes of the tensors they are given."""
        name = func.name()
        if name.startswith(("c10d::", "_c10d_functional::")) or "shm_all" in name or "shm_gather" in name:
            short = name.partition("::")[2].rstrip("_")
            self.collectives[short] += 1
            self.bytes[short] += _bytes_of(args)
        return func(*args, **(kwargs or {}))


_recorder: _Recorder | None = None


def install(*, keep_outputs: bool = False) -> None:
    """Watch this process from now on. Call it in a rank before its model is built, and once."""
    global _recorder
    _recorder = _Recorder(keep_outputs)
    _recorder.start()


def collect(pipeline: nn.Module) -> Trace:
    """Return what has been seen, under the pipeline's module paths.

    Raises:
        RuntimeError: nothing was installed.
    """
    if _recorder is None:
        raise RuntimeError("install() was not called before the model ran")
    paths = {id(module): path for path, module in pipeline.named_modules()}
    _recorder.number(branches=1)
    return Trace(
        rank_coords=_rank_coords(),
        attention={paths[key]: calls for key, calls in _recorder.calls.items() if key in paths},
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
    """Whether this is a diffusion transformer: it declares how vLLM-Omni may shard it."""
    return hasattr(type(module), "_hsdp_shard_conditions") or hasattr(type(module), "_sp_plan")


def _divided(noted: list[tuple[int, Noted]], branches: int) -> Iterator[tuple[int, int, Noted]]:
    """Divide what each module did, in order, into as many equal parts: yields module, part, what it did."""
    total = Counter(key for key, _ in noted)
    met: Counter[int] = Counter()
    for key, what in noted:
        yield key, met[key] * branches // total[key], what
        met[key] += 1


def _tensors(output: Any) -> list[Tensor]:
    values = output if isinstance(output, (tuple, list)) else (output,)
    return [value for value in values if isinstance(value, Tensor) and value.is_floating_point()]


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().float().cpu().clone()


def _fingerprint(args: tuple[Any, ...]) -> tuple[float, ...]:
    """Reduce the tensors among the arguments to one number each; equal inputs give equal numbers."""
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
    """This rank's place in each group, from the groups themselves."""
    from vllm.distributed import get_tp_group
    from vllm_omni.diffusion.distributed.parallel_state import get_cfg_group, get_sp_group

    groups = {"tp": get_tp_group(), "sequence": get_sp_group(), "cfg": get_cfg_group()}
    return {kind: group.rank_in_group for kind, group in groups.items()}
