"""Classifier-free guidance spread over ranks, around an unmodified pipeline.

Two forms are covered, and any number of branches:

- Branches that are calls of the transformer, one after the other in a step. Calls are dealt to the ranks in turn. Their
  results are :class:`~port_kit.autoparallel.promise.Promise` tensors until the pipeline reads one of them.
- Branches that are rows of one batch. Each rank computes its rows.

The first call with new shapes runs completely on every rank. It shows the shapes of the results, and proves that rows
of a batch can be computed apart: each rank's rows are exchanged and compared with the complete result.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from vllm_omni.diffusion.cancellation import check_request_cancellation

from port_kit.autoparallel.derive import derive
from port_kit.autoparallel.promise import Group, PendingCall, PendingCalls, Promise, plain, promises
from port_kit.autoparallel.rows import Rows, row_leaves, take_rows
from port_kit.errors import ParallelError
from port_kit.upstream.checks import require

require("pytree")

#: Signatures of calls that are remembered per module.
_REMEMBERED = 256


class OmniGuidanceGroup:
    """vLLM-Omni's group of guidance ranks."""

    def __init__(self) -> None:
        from vllm_omni.diffusion.distributed.parallel_state import get_cfg_group

        self._group = get_cfg_group()
        self.rank: int = self._group.rank_in_group
        self.size: int = self._group.world_size

    def broadcast(self, tensor: Tensor, source: int) -> None:
        """Overwrite a contiguous tensor with that of the rank ``source``."""
        self._group.broadcast(tensor, source)


@dataclass(frozen=True)
class _Memory:
    """Shape, dtype and device of a result."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def like(cls, tensor: Tensor) -> _Memory:
        return cls(tensor.shape, tensor.dtype, tensor.device)

    def empty(self) -> Tensor:
        return torch.empty(self.shape, dtype=self.dtype, device=self.device)


@dataclass(frozen=True)
class _Result:
    """Structure of a call's result, with :class:`_Memory` in place of tensors, and how its rows are split."""

    structure: Any
    rows: Rows | None

    def empty(self) -> Any:
        return pytree.tree_map_only(_Memory, lambda memory: memory.empty(), self.structure)


class SpreadGuidance:
    """Guidance of one pipeline spread over the ranks of a group.

    Attributes:
        pending: calls since the last exchange.
        computed: calls that this rank ran, in units of one complete call; for tests and reports.
    """

    def __init__(self, group: Group, *, keeps_pace: bool = False) -> None:
        self.pending = PendingCalls(group, keeps_pace)
        self.computed = 0.0
        self._results: dict[int, OrderedDict[Any, _Result]] = {}

    @property
    def branches(self) -> list[str]:
        """Forms of the branches that were seen: ``calls``, ``rows`` or both."""
        seen = [result for results in self._results.values() for result in results.values()]
        return sorted({"calls" if result.rows is None else "rows" for result in seen})

    @contextmanager
    def request(self) -> Iterator[None]:
        """Run one request of the pipeline; results of a failed one are not exchanged."""
        self.pending.reset()
        yield
        self.pending.settle()

    def call(self, module: nn.Module, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a call of the transformer, or take part in it.

        Raises:
            ParallelError: ``cfg_early_read``, ``cfg_rows``.
            DiffusionRequestAbortedError: of vLLM-Omni; the request was cancelled. All ranks decide together.
        """
        check_request_cancellation()
        if any(not promise._call.settled for promise in promises((args, kwargs))):
            self.pending.settle()
        self._check_order(module)
        args, kwargs = plain(args), plain(kwargs)
        results = self._results.setdefault(id(module), OrderedDict())
        signature = _signature((args, kwargs))
        if signature not in results:
            output, results[signature] = self._observe(module, run, args, kwargs)
            if len(results) > _REMEMBERED:
                results.popitem(last=False)
            return output
        known = results[signature]
        results.move_to_end(signature)
        if known.rows is not None:
            return self._run_rows(known, known.rows, run, args, kwargs)
        return self._run_or_promise(known, run, args, kwargs)

    def _check_order(self, module: nn.Module) -> None:
        if self.pending.steps and self.pending.settled_in_step:
            self.pending.reset()
            raise ParallelError(
                f"{type(module).__name__}: the pipeline reads the result of a branch before it begins the next branch "
                "of the step",
                code="cfg_early_read",
                hint="set cfg_parallel_size to 1",
            )

    def _observe(
        self, module: nn.Module, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, _Result]:
        """Run a call on every rank; return its output and what it shows about further ones."""
        output = run(*args, **kwargs)
        self.computed += 1
        structure = pytree.tree_map_only(Tensor, _Memory.like, output)
        batch = _batch(output)
        if batch < 2:
            return output, _Result(structure, None)
        for lists in (False, True):
            known = _Result(structure, Rows(batch, lists))
            if self._rows_agree(known, output, run, args, kwargs):
                return output, known
        raise ParallelError(
            f"{type(module).__name__}: the {batch} rows of a call do not give the same results one by one",
            code="cfg_rows",
            hint="set cfg_parallel_size to 1",
            rows=batch,
        )

    def _rows_agree(
        self, known: _Result, output: Any, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> bool:
        """Return True if the rows of all ranks together are the complete output. The verdict is that of rank 0."""
        assert known.rows is not None
        if known.rows.split((args, kwargs)) and known.rows.covers(output):
            joined = self._run_rows(known, known.rows, run, args, kwargs)
            close = all(map(_close, pytree.tree_leaves(joined), pytree.tree_leaves(output)))
        else:
            return False
        device = next(x.device for x in pytree.tree_leaves(output) if isinstance(x, Tensor))
        verdict = torch.tensor([int(close)], device=device)
        self.pending.group.broadcast(verdict, 0)
        return bool(verdict.item())

    def _run_rows(
        self, known: _Result, rows: Rows, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        group, whole = self.pending.group, known.empty()
        parts = rows.divide(group.size)
        own = parts[group.rank]
        if own.stop > own.start:
            mine = run(*take_rows(args, own, rows), **take_rows(kwargs, own, rows))
            self.computed += (own.stop - own.start) / rows.batch
            for target, value in zip(row_leaves(whole, rows, own), row_leaves(mine), strict=True):
                target.copy_(value)
        elif self.pending.keeps_pace:
            run(*take_rows(args, slice(0, 1), rows), **take_rows(kwargs, slice(0, 1), rows))
        for source, part in enumerate(parts):
            if part.stop > part.start:
                for tensor in row_leaves(whole, rows, part):
                    group.broadcast(tensor, source)
        return whole

    def _run_or_promise(
        self, known: _Result, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        owner = self.pending.next_owner
        if owner == self.pending.group.rank:
            output = pytree.tree_map_only(Tensor, lambda x: x.contiguous(), run(*args, **kwargs))
            self.computed += 1
        else:
            output = known.empty()
        tensors = [x for x in pytree.tree_leaves(output) if isinstance(x, Tensor)]
        call = PendingCall(owner, tensors, functools.partial(run, *args, **kwargs))
        self.pending.calls.append(call)
        return pytree.tree_map_only(Tensor, lambda x: Promise.of(x, self.pending, call), output)


def spread_guidance(
    pipeline: Any, transformers: Mapping[str, nn.Module], group: Group, *, keeps_pace: bool = False
) -> SpreadGuidance:
    """Spread the guidance of a pipeline over the ranks of a group.

    The transformers and schedulers get subclasses of their classes, with the same names. Copies of a scheduler that the
    pipeline makes keep them.

    Args:
        pipeline: a diffusers pipeline.
        transformers: its modules that guidance calls.
        group: the ranks.
        keeps_pace: every rank must run equally many calls (HSDP over these ranks).
    """
    spread = SpreadGuidance(group, keeps_pace=keeps_pace)

    for module in transformers.values():
        derive(module, {"__call__": _call(type(module).__call__, spread)})
    for scheduler in pipeline.components.values():
        if callable(getattr(scheduler, "step", None)) and hasattr(scheduler, "set_timesteps"):
            derive(scheduler, {"step": _step(type(scheduler).step, spread.pending)})
    return spread


def _call(original: Callable[..., Any], spread: SpreadGuidance) -> Callable[..., Any]:
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return spread.call(self, functools.partial(original, self), args, kwargs)

    return call


def _step(original: Callable[..., Any], pending: PendingCalls) -> Callable[..., Any]:
    @functools.wraps(original)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        pending.settle()
        result = original(self, *plain(args), **plain(kwargs))
        pending.end_step()
        return result

    return step


def _batch(output: Any) -> int:
    """Return the rows of a call: the length of its first tensor, or of a list of tensors that comes before it."""
    values = list(output.values()) if isinstance(output, dict) else output
    first = values[0] if isinstance(values, tuple | list) and values else values
    if isinstance(first, list):
        return len(first)
    return first.shape[0] if isinstance(first, Tensor) and first.dim() else 1


def _close(one: Any, other: Any) -> bool:
    if not isinstance(other, Tensor):
        return True
    scale = other.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    tolerance = torch.finfo(other.dtype).eps ** 0.5 if other.is_floating_point() else 0.0
    return bool(((one - other).abs().max() / scale).item() <= tolerance)


def _signature(value: Any) -> Any:
    """Return a hashable summary: structure, shapes and dtypes of tensors, values of integers, booleans and strings."""
    if isinstance(value, Tensor):
        return "tensor", tuple(value.shape), value.dtype
    if isinstance(value, dict):
        return tuple((key, _signature(item)) for key, item in value.items())
    if isinstance(value, tuple | list):
        return type(value).__name__, tuple(map(_signature, value))
    if value is None or isinstance(value, bool | int | str):
        return type(value).__name__, value
    return type(value).__qualname__
