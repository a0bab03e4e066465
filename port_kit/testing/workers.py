"""Diffusion workers without an engine: a pipeline on N local ranks.

The calling process imports the dependencies once. Each case forks one process per rank. Each rank runs vLLM-Omni's own
``DiffusionWorker``: the standard loader, the hooks, the parallel groups and the model runner are those of the engine.
The engine's process management and post-processing are left out. ::

    results = run_workers(model_dir, [Request("a cat", {"num_inference_steps": 2, "seed": 0})],
                          config={"parallel_config": {"ulysses_degree": 2}},
                          probe=lambda pipeline: pipeline.transformer.local_length)
    results[0].outputs[0]     # outputs of rank 0's pipeline
    results[1].probe          # result of rank 1's probe

Outputs and probes cross by value, so they must be picklable. On CUDA, which does not survive a fork, every rank is
started afresh and imports by itself; functions cross through cloudpickle, closures included. Linux only.
"""

from __future__ import annotations

import gc
import os
import pickle
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from port_kit.errors import ParallelError
from port_kit.testing.rank import Case, Failure, RankResult, Request, rank_main, send_result

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from multiprocessing.process import BaseProcess

    from torch import nn

#: Seconds that a rank gets to leave by itself once its result is in.
_GRACE = 10.0

__all__ = ["PrewarmedRanks", "RankResult", "Request", "run_ranks", "run_workers", "warm_up"]


def run_workers(
    model: str | os.PathLike[str],
    requests: Sequence[Request],
    *,
    config: Mapping[str, Any] | None = None,
    setup: Callable[[], None] | None = None,
    probe: Callable[[nn.Module], Any] | None = None,
    keep_going: bool = False,
    timeout: float = 120.0,
    start: Literal["fork", "spawn"] | None = None,
    prewarmed: PrewarmedRanks | None = None,
) -> list[RankResult]:
    """Load a model on the ranks of its parallel configuration, run requests, and return all results.

    Args:
        model: a model directory.
        requests: run one after the other on every rank.
        config: fields of ``OmniDiffusionConfig``; ``parallel_config`` as a mapping. The dtype is float32 and
            execution eager unless it says otherwise.
        setup: called in every rank before the worker is built (register a pipeline, change the environment).
        probe: called in every rank after the last request, with the pipeline.
        keep_going: keep a request's exception in the result and run the next one, as the engine does.
        timeout: seconds for everything; after it every rank is killed.
        start: how processes begin; None is ``spawn`` on CUDA and ``fork`` elsewhere.
        prewarmed: spawned ranks to use first.

    Raises:
        ParallelError: a rank failed, died or did not finish in time. A :class:`PortKitError` of the rank is its
            ``__cause__``; ``details`` has the rank and the traceback.
    """
    from vllm.utils.network_utils import get_open_port
    from vllm_omni.platforms import current_omni_platform

    start = start or ("spawn" if current_omni_platform.is_cuda() else "fork")
    if start == "fork":
        warm_up()
        _refuse_inherited_world()
    case = Case(os.fspath(model), requests, config or {}, setup, probe, keep_going, get_open_port())
    world = _world_size(case.config)
    processes, pipes = _fork(case, world) if start == "fork" else _spawn(case, world, prewarmed or PrewarmedRanks(0))
    return _collect_and_stop(processes, pipes, timeout)


def run_ranks(world: int, work: Callable[[int], Any], *, timeout: float = 120.0) -> list[Any]:
    """Fork ranks that each call ``work(rank)``, and return what they returned, which must be picklable.

    Process groups are up to ``work``. Linux only.

    Args:
        world: number of ranks.
        work: may be a closure.
        timeout: seconds for everything; after it every rank is killed.

    Raises:
        ParallelError: as :func:`run_workers`.
    """
    _refuse_inherited_world()

    def main(rank: int, sender: Connection) -> None:
        from vllm_omni.engine.stage_init_utils import set_death_signal

        set_death_signal(signal.SIGKILL)
        send_result(rank, lambda: work(rank), sender)

    processes, pipes = _start_forks(world, main)
    return _collect_and_stop(processes, pipes, timeout)


def _collect_and_stop(processes: list[BaseProcess], pipes: list[Connection], timeout: float) -> list[Any]:
    """Return the results in the order of the ranks; end all processes in any case."""
    try:
        results = _collect(processes, pipes, timeout)
    except BaseException:
        _stop(processes, grace=0.0)
        raise
    _stop(processes, grace=_GRACE)
    return [results[rank] for rank in range(len(processes))]


@cache
def warm_up() -> None:
    """Import the dependencies of every worker, once."""
    from vllm.utils.import_utils import resolve_obj_by_qualname
    from vllm_omni.platforms import current_omni_platform
    from vllm_omni.plugins import load_omni_general_plugins

    load_omni_general_plugins()
    for path in (
        current_omni_platform.get_diffusion_worker_cls(),
        current_omni_platform.get_diffusion_model_runner_cls(),
        "vllm_omni.inputs.data.OmniDiffusionSamplingParams",
    ):
        resolve_obj_by_qualname(path)
    # Workers collect garbage about ten times each; without this every collection walks the imported modules.
    gc.collect()
    gc.freeze()


def _refuse_inherited_world() -> None:
    """Raise an error if a process group is initialized, because a fork would inherit it."""
    import torch

    if torch.distributed.is_initialized():
        raise ParallelError(
            "workers cannot be forked from a process that is inside a torch.distributed world",
            code="worker_fork",
            hint="leave the world first (torch.distributed.destroy_process_group)",
        )


def _world_size(config: Mapping[str, Any]) -> int:
    from vllm_omni.diffusion.data import DiffusionParallelConfig

    parallel = config.get("parallel_config", {})
    if isinstance(parallel, Mapping):
        parallel = DiffusionParallelConfig(**parallel)
    return int(parallel.world_size)


class PrewarmedRanks:
    """Processes that import their dependencies in advance and wait for a case.

    Args:
        count: how many are started.
    """

    def __init__(self, count: int) -> None:
        self._ranks = [_begin() for _ in range(count)]

    def take(self) -> tuple[BaseProcess, Connection]:
        """Return one of them, or a new one."""
        return self._ranks.pop(0) if self._ranks else _begin()

    def close(self) -> None:
        """Stop the unused processes."""
        for process, pipe in self._ranks:
            pipe.close()
            process.kill()
            process.join(_GRACE)
        self._ranks.clear()


def _begin() -> tuple[BaseProcess, Connection]:
    import multiprocessing

    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_wait_for_case, args=(theirs,), name="port-kit-rank")
    process.start()
    theirs.close()  # so that we see the end when the rank dies
    return process, ours


def _wait_for_case(pipe: Connection) -> None:
    """Import, wait for a case and run it in a spawned rank. Return if the parent process exits."""
    warm_up()
    try:
        rank, case = pickle.loads(pipe.recv_bytes())
    except EOFError:
        return
    rank_main(rank, case, pipe)


def _spawn(case: Case, world: int, prewarmed: PrewarmedRanks) -> tuple[list[BaseProcess], list[Connection]]:
    import cloudpickle

    ranks = [prewarmed.take() for _ in range(world)]
    for rank, (process, pipe) in enumerate(ranks):
        try:
            pipe.send_bytes(cloudpickle.dumps((rank, case)))
        except OSError:  # it died during imports; its output has the reason
            process.join(_GRACE)
    return [process for process, _ in ranks], [pipe for _, pipe in ranks]


def _fork(case: Case, world: int) -> tuple[list[BaseProcess], list[Connection]]:
    return _start_forks(world, lambda rank, sender: rank_main(rank, case, sender))


def _start_forks(world: int, main: Callable[[int, Connection], None]) -> tuple[list[BaseProcess], list[Connection]]:
    import multiprocessing

    # A process group that lies in the garbage is destroyed by whoever collects it, which joins its threads; a fork has
    # the group and not the threads, and would wait for ever.
    gc.collect()
    context = multiprocessing.get_context("fork")
    processes: list[BaseProcess] = []
    pipes: list[Connection] = []
    for rank in range(world):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=main, args=(rank, sender), name=f"port-kit-rank-{rank}")
        process.start()
        sender.close()  # so that the receiver sees the end when the rank dies
        processes.append(process)
        pipes.append(receiver)
    return processes, pipes


def _collect(processes: Sequence[BaseProcess], pipes: Sequence[Connection], timeout: float) -> dict[int, Any]:
    """Wait for one message per rank. Stop at the first failure, because other ranks may hang in a collective."""
    from multiprocessing.connection import wait

    deadline = time.monotonic() + timeout
    open_pipes = {pipe: rank for rank, pipe in enumerate(pipes)}
    results: dict[int, Any] = {}
    while open_pipes:
        ready = wait(list(open_pipes), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise _late(sorted(open_pipes.values()), timeout)
        for pipe in ready:
            rank = open_pipes.pop(pipe)  # type: ignore[call-overload]
            results[rank] = _receive(pipe, rank, processes[rank])  # type: ignore[arg-type]
    return results


def _receive(pipe: Connection, rank: int, process: BaseProcess) -> Any:
    try:
        message = pickle.loads(pipe.recv_bytes())
    except EOFError:
        process.join(_GRACE)
        raise ParallelError(
            f"rank {rank} died with exit code {process.exitcode} before it had a result",
            code="worker_died",
            hint="a negative code is a signal: -9 is often a lack of memory",
            rank=rank,
        ) from None
    finally:
        pipe.close()
    if isinstance(message, Failure):
        raise _failed(message) from message.error
    return message


def _failed(failure: Failure) -> ParallelError:
    return ParallelError(
        f"rank {failure.rank} failed: {failure.text}\n{failure.traceback}",
        code="worker_failed",
        hint=failure.error.hint if failure.error else "the traceback above is the rank's",
        rank=failure.rank,
        traceback=failure.traceback,
    )


def _late(ranks: list[int], timeout: float) -> ParallelError:
    return ParallelError(
        f"ranks {', '.join(map(str, ranks))} had no result after {timeout:g} s",
        code="worker_timeout",
        hint="a rank that waits in a collective which the others never enter looks like this",
        ranks=ranks,
    )


def _stop(processes: Sequence[BaseProcess], *, grace: float) -> None:
    """Stop and reap all ranks."""
    deadline = time.monotonic() + grace
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    for process in processes:
        if process.is_alive():
            process.kill()
        process.join(_GRACE)
        process.close()
