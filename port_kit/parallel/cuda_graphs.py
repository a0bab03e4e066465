"""CUDA graphs of a part of a model: captured at the second call of a kind, replayed afterwards.

Launching the kernels of a large transformer takes the host longer than a GPU needs for a small input. A graph launches
them in one call. The part is a function of tensors; all else that it depends on is in a hashable ``kind``::

    graphs = GraphCache(device)
    outputs = graphs.call(kind=(length, skipped), function=run_blocks, inputs=[tokens, modulation], constants=[])

The first call of a kind runs the function and lets kernels compile and buffers grow; the second one captures it.
Exchanges through symmetric memory are part of a graph (:mod:`~port_kit.parallel.comm.symm_mem`). All ranks of a group
must make the same calls. The function must not synchronize with the host and must not depend on values of tensors.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import ref

import torch
from torch import Tensor
from vllm.platforms import current_platform

from port_kit.parallel.cfg_batching import weights_are_streamed
from port_kit.parallel.comm import symm_mem

if TYPE_CHECKING:
    from vllm_omni.diffusion.data import OmniDiffusionConfig

logger = logging.getLogger(__name__)

#: Kinds of calls that are remembered. The least recently used one is forgotten, and its graph freed.
MAX_KINDS = 12
#: Replays that may be launched and not finished. More would not save time, and would delay cancellation.
MAX_AHEAD = 2

#: A function from its inputs and the tensors of its constants to its outputs.
Function = Callable[[Sequence[Tensor], Sequence[Sequence[Tensor]]], list[Tensor]]


@dataclass(frozen=True)
class Constant:
    """Input tensors that are equal for several calls.

    Attributes:
        source: object that identifies the values; they are copied to a graph's input again if it is another object.
        tensors: the values.
    """

    source: Any
    tensors: Sequence[Tensor]


def graphs_are_possible(config: OmniDiffusionConfig) -> bool:
    """Return True if all calls of a transformer launch the same kernels on the same addresses of weights.

    HSDP, offload and sleep mode move weights, a cache backend skips blocks, and attention may use another dtype in some
    steps.
    """
    moved = weights_are_streamed(config) or config.enable_cpu_offload or config.enable_sleep_mode
    varies = config.cache_backend not in (None, "", "none") or config.diffusion_kv_cache_skip_steps
    return current_platform.is_cuda() and not moved and not varies


class CapturedCall:
    """A graph with its inputs and outputs.

    Args:
        function: what is captured.
        inputs: first inputs.
        constants: first constants.
        pool: memory pool of this device's graphs, which never run at the same time.
        stream: stream of the capture.
    """

    def __init__(
        self,
        function: Function,
        inputs: Sequence[Tensor],
        constants: Sequence[Constant],
        pool: tuple[int, int],
        stream: torch.cuda.Stream,
    ) -> None:
        self.inputs = [torch.empty_like(x) for x in inputs]
        self.constants = [[torch.empty_like(x) for x in constant.tensors] for constant in constants]
        self._sources: list[Callable[[], Any]] = [lambda: None] * len(constants)
        self.graph = torch.cuda.CUDAGraph()
        # Other threads, such as the watchdog of NCCL, may call CUDA meanwhile.
        with torch.cuda.graph(self.graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            self.outputs = function(self.inputs, self.constants)
            symm_mem.complete_rounds()
        self._memory = symm_mem.allocated_memory()

    def replay(self, inputs: Sequence[Tensor], constants: Sequence[Constant]) -> list[Tensor]:
        """Return the outputs for these inputs; the next replay overwrites them."""
        torch._foreach_copy_(self.inputs, list(inputs))
        for index, constant in enumerate(constants):
            if self._sources[index]() is not constant.source:
                torch._foreach_copy_(self.constants[index], list(constant.tensors))
                self._sources[index] = ref(constant.source)
        self.graph.replay()
        return self.outputs


class GraphCache:
    """Graphs of one function on one device, by kind.

    Args:
        device: CUDA device of all tensors.
        max_kinds: see :data:`MAX_KINDS`.
    """

    def __init__(self, device: torch.device, max_kinds: int = MAX_KINDS) -> None:
        self.device, self.max_kinds = device, max_kinds
        self._calls: OrderedDict[Hashable, CapturedCall | None] = OrderedDict()
        self._refused: set[Hashable] = set()
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)
        self._replays: deque[torch.cuda.Event] = deque()

    def call(
        self, kind: Hashable, function: Function, inputs: Sequence[Tensor], constants: Sequence[Constant] = ()
    ) -> list[Tensor]:
        """Return the outputs of the function; a later call may overwrite them.

        Args:
            kind: all that the function depends on beside the tensors. Their shapes and dtypes are added.
            function: equal for equal kinds.
            inputs: tensors that change from call to call.
            constants: tensors that often stay.
        """
        shapes = tuple((x.shape, x.dtype) for x in [*inputs, *(x for one in constants for x in one.tensors)])
        key = (kind, shapes)
        symm_mem.complete_rounds()
        captured = self._find(key, function, inputs, constants)
        if captured is None:
            return self._run(function, inputs, constants)
        if len(self._replays) >= MAX_AHEAD:
            self._replays.popleft().synchronize()
        outputs = captured.replay(inputs, constants)
        self._replays.append(torch.cuda.current_stream(self.device).record_event())
        return outputs

    @property
    def captured(self) -> int:
        """Number of graphs."""
        return sum(call is not None for call in self._calls.values())

    def _find(
        self, key: Hashable, function: Function, inputs: Sequence[Tensor], constants: Sequence[Constant]
    ) -> CapturedCall | None:
        """Return the graph of a kind, captured now if the kind is known; None for a new kind, and where it failed."""
        if key in self._refused:
            return None
        if key not in self._calls:
            self._calls[key] = None
            if len(self._calls) > self.max_kinds:
                self._calls.popitem(last=False)
            return None
        self._calls.move_to_end(key)
        if self._calls[key] is None:
            self._calls[key] = self._capture(function, inputs, constants)
            if self._calls[key] is None:
                del self._calls[key]
                self._refused.add(key)
        return self._calls.get(key)

    def _capture(
        self, function: Function, inputs: Sequence[Tensor], constants: Sequence[Constant]
    ) -> CapturedCall | None:
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()  # of the call without a graph, which needed the same memory
        before, start = torch.cuda.memory_reserved(self.device), time.perf_counter()
        try:
            with symm_mem.restored_on_error():
                call = CapturedCall(function, inputs, constants, self._pool, self._stream)
        except torch.OutOfMemoryError as error:
            logger.warning("no memory for a CUDA graph; these calls run without one: %s", error)
            torch.cuda.empty_cache()
            return None
        grown = (torch.cuda.memory_reserved(self.device) - before) / 2**20
        logger.info("captured CUDA graph %d in %.2f s, %.0f MiB", self.captured + 1, time.perf_counter() - start, grown)
        return call

    def _run(self, function: Function, inputs: Sequence[Tensor], constants: Sequence[Constant]) -> list[Tensor]:
        """Run the function on the stream of captures: symmetric memory is allocated per stream."""
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            outputs = function(inputs, [constant.tensors for constant in constants])
            symm_mem.complete_rounds()
        current.wait_stream(self._stream)
        for output in outputs:
            output.record_stream(current)
        return outputs
