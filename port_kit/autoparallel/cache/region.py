"""Blocks of one list under one decision of Cache-DiT per step.

Cache-DiT replaces a list by one module that calls all blocks with the arguments of the first. That excludes modules
that give each block other arguments, or compute between the blocks. Here the module's own loop runs. Each block asks
its region before it computes: in a cached step, blocks after the first ones return their arguments, and the last
of them returns the states that Cache-DiT reconstructs. Contexts, decisions, buffers and statistics are Cache-DiT's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from cache_dit.caching.cache_contexts.cache_manager import CachedContextManager, ContextNotExistError
from torch import Tensor, nn

from port_kit.autoparallel.boundaries import Boundary
from port_kit.autoparallel.derive import derive
from port_kit.autoparallel.plan import CacheState
from port_kit.autoparallel.tree import Arguments, leaves, rebuild
from port_kit.errors import ParallelError
from port_kit.escape import quoted
from port_kit.upstream.checks import require

require("cache_decisions")

States = tuple["Tensor | None", ...]
#: Attribute of a block with its :class:`Member`.
_MEMBER = "_port_kit_cached"


class Region:
    """State of one list of blocks.

    Args:
        manager: Cache-DiT's contexts of the module.
        context: name of the list's context.
        prefix: name of the list, for the buffers.
        count: number of blocks.

    Attributes:
        reuse: the current step reuses.
        active: a forward is between the first and the last block.
        computed: calls of blocks that ran, over all steps.
        skipped: calls of blocks that did not run.
    """

    def __init__(self, manager: CachedContextManager, context: str, prefix: str, count: int) -> None:
        self.manager, self.context, self.prefix, self.count = manager, context, prefix, count
        self.reuse = self.active = False
        self.computed = self.skipped = 0
        self.entered: Tensor | None = None
        self.base: States = ()

    @property
    def enabled(self) -> bool:
        """True while the context exists: Cache-DiT removes it when it is disabled."""
        try:
            self.manager.get_context(self.context)
        except ContextNotExistError:
            return False
        return True

    def begin(self, states: States) -> None:
        """Enter the first block.

        Raises:
            ParallelError: ``plan_cache``; the configuration computes more blocks than the list has.
        """
        self.manager.set_context(self.context)
        self.reuse, self.active, self.entered = False, True, states[0]
        first, last = self.computed_blocks()
        if first > last:
            raise ParallelError(
                f"{self.prefix}: {self.count} blocks, of which Cache-DiT always computes {first + self.count - last}",
                code="plan_cache",
                hint="set Fn_compute_blocks and Bn_compute_blocks of cache_config to a smaller sum",
            )

    def computed_blocks(self) -> tuple[int, int]:
        """Return the ends of the blocks that may be skipped."""
        with self.manager.enter_context(self.context):
            return self.manager.Fn_compute_blocks(), self.count - self.manager.Bn_compute_blocks()

    def skips(self, index: int | None) -> bool:
        """Return True if a block does not compute in this step; None stands for a block of a list that follows."""
        if index is None:
            return self.reuse and self.active
        first, last = self.computed_blocks()
        return self.reuse and first <= index < last

    def leave_block(self, index: int, states: States) -> States:
        """Decide after the first blocks, and reconstruct or store after the last; return the states."""
        first, last = self.computed_blocks()
        if index == first - 1:
            self._decide(states)
        if index == last - 1:
            with self.manager.enter_context(self.context):
                states = self._reconstruct(states) if self.reuse else self._store(states)
        self.active = index < self.count - 1
        if not self.active:
            self.entered, self.base = None, ()
        return states

    def _decide(self, states: States) -> None:
        assert self.entered is not None and states[0] is not None
        residual, buffer = states[0] - self.entered, f"{self.prefix}_Fn_residual"
        self.base = states
        with self.manager.enter_context(self.context):
            self.manager.mark_step_begin()
            self.reuse = self.manager.can_cache(residual, parallelized=_parallelized(), prefix=buffer)
            if self.reuse:
                self.manager.add_cached_step()
            else:
                self.manager.set_Fn_buffer(residual, prefix=buffer)

    def _buffer(self, number: int) -> str:
        """Return the name of the buffer of a state: the second one is Cache-DiT's encoder buffer."""
        part = f"_{number}" if number > 1 else ""
        return f"{self.prefix}{part}_Bn_residual"

    def _reconstruct(self, states: States) -> States:
        hidden, *others = self.base
        second = others[0] if others else None
        found = [*self.manager.apply_cache(hidden, second, self._buffer(0), self._buffer(1))][: len(states)]
        for number, state in enumerate(others[1:], start=2):
            found.append(self.manager.apply_cache(state, None, self._buffer(number))[0])
        return tuple(found)

    def _store(self, states: States) -> States:
        for number, (state, base) in enumerate(zip(states, self.base, strict=True)):
            if state is not None and base is not None:
                encoder = number == 1
                set_buffer = self.manager.set_Bn_encoder_buffer if encoder else self.manager.set_Bn_buffer
                residual = self.manager.is_encoder_cache_residual() if encoder else self.manager.is_cache_residual()
                set_buffer(state - base if residual else state, prefix=self._buffer(number))
        return states


@dataclass
class Member:
    """One block of a region.

    Attributes:
        region: the region.
        index: position in the list; None for a block of a list that follows the region's decision.
        names: names of the block's arguments.
        states: states of the list.
        boundary: hooks that shard and gather tokens; they run around the region's work.
        template: last output of the block without its states.
    """

    region: Region
    index: int | None
    names: Arguments
    states: Sequence[CacheState]
    boundary: Boundary | None
    template: Any = None

    def call(self, run: Callable[..., Any], block: nn.Module, args: Any, kwargs: Any) -> Any:
        """Call the block, or skip it."""
        if not self.region.enabled:
            return run(*args, **kwargs)
        if self.boundary is None:
            return self._call(run, args, kwargs)
        args, kwargs = self.boundary.enter(block, args, kwargs)
        self.boundary.lifted = True
        try:
            output = self._call(run, args, kwargs)
        finally:
            self.boundary.lifted = False
        return output if self.boundary.leave is None else self.boundary.leave(block, args, output)

    def _call(self, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        given = self._given(args, kwargs)
        if self.index == 0:
            self.region.begin(given)
        skips = self.region.skips(self.index)
        if skips:
            self.region.skipped += 1
            states = given
        else:
            self.region.computed += 1
            output = run(*args, **kwargs)
            states = self._taken(output)
        left = states if self.index is None else self.region.leave_block(self.index, states)
        return self._with(left) if skips or left is not states else output

    def _given(self, args: Any, kwargs: Any) -> States:
        found = dict(leaves(self.names.named(args, kwargs)))
        return tuple(found.get(state.input) for state in self.states)

    def _taken(self, output: Any) -> States:
        """Return the states of an output, and keep the rest of it: a skipped call returns the same.

        Raises:
            ParallelError: ``plan_cache``; the output has a tensor that is no state.
        """
        found = dict(leaves(output))
        tensors = {path for path, leaf in found.items() if isinstance(leaf, Tensor)}
        if unknown := sorted(tensors - {state.output for state in self.states}):
            raise ParallelError(
                f"{self.region.prefix}: a block returns a tensor at {quoted(unknown[0])}, which the plan does not name",
                code="plan_cache",
                hint="infer the plan again: port-kit plan infer CLASS -o FILE",
            )
        self.template = rebuild(output, lambda path, leaf: _STATE if path in tensors else leaf)
        return tuple(found.get(state.output) for state in self.states)

    def _with(self, states: States) -> Any:
        by_path = {state.output: value for state, value in zip(self.states, states, strict=True)}
        return rebuild(self.template, lambda path, leaf: by_path[path] if leaf is _STATE else leaf)


#: Place of a state in a template.
_STATE = object()


def cache_block(block: nn.Module, member: Member) -> None:
    """Call a block through a region from now on."""
    installed = hasattr(block, _MEMBER)
    setattr(block, _MEMBER, member)
    if not installed:
        derive(block, {"__call__": _call(type(block).__call__)})


def _call(original: Callable[..., Any]) -> Callable[..., Any]:
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        member: Member = getattr(self, _MEMBER)
        return member.call(partial(original, self), self, args, kwargs)

    return call


def _parallelized() -> bool:
    """Return True if ranks decide together, by the mean of their differences."""
    import torch.distributed as dist

    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
