"""One rank of :mod:`port_kit.testing.workers`: the code that runs in its process."""

from __future__ import annotations

import os
import pickle
import signal
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from port_kit.errors import PortKitError
from port_kit.upstream.checks import require

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from torch import nn
    from vllm_omni.diffusion.data import OmniDiffusionConfig

#: The end of a traceback that a report carries, in characters.
_TRACEBACK = 6000


@dataclass(frozen=True)
class Request:
    """One request: the prompt as ``Omni.generate`` takes it, and fields of ``OmniDiffusionSamplingParams``."""

    prompt: str | Mapping[str, Any]
    sampling: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RankResult:
    """Result of one rank.

    Attributes:
        rank: the global rank.
        outputs: one entry a request: the pipeline's ``DiffusionOutput.output``; None if the request failed.
        errors: one entry a request: None, or the exception (only with ``keep_going``).
        probe: result of ``probe`` on this rank; None without one.
        load_seconds: building the worker and loading the weights.
        run_seconds: all requests together.
    """

    rank: int
    outputs: tuple[Any, ...]
    errors: tuple[BaseException | None, ...]
    probe: Any
    load_seconds: float
    run_seconds: float


@dataclass(frozen=True)
class Failure:
    """Error of a rank: its text and traceback, and the exception if it can be pickled."""

    rank: int
    text: str
    traceback: str
    error: PortKitError | None


@dataclass(frozen=True)
class Case:
    """Everything a rank needs; functions may be closures."""

    model: str
    requests: Sequence[Request]
    config: Mapping[str, Any]
    setup: Callable[[], None] | None
    probe: Callable[[nn.Module], Any] | None
    keep_going: bool
    port: int


def rank_main(rank: int, case: Case, sender: Connection) -> None:
    """The life of one rank of a case."""
    send_result(rank, lambda: _run_rank(rank, case), sender)


def send_result(rank: int, work: Callable[[], Any], sender: Connection) -> None:
    """The life of one rank: do the work, send one message, and leave without the parent's exit handlers."""
    code = 0
    try:
        payload = pickle.dumps(work())
    except BaseException as error:  # noqa: B036 - the parent must receive any error
        code = 1
        payload = _describe(rank, error)
    sender.send_bytes(payload)
    sender.close()
    os._exit(code)


def _describe(rank: int, error: BaseException) -> bytes:
    text = "".join(traceback.format_exception_only(error)).strip()
    trace = "".join(traceback.format_exception(error))[-_TRACEBACK:]
    known = error if isinstance(error, PortKitError) else None
    try:
        return pickle.dumps(Failure(rank, text, trace, known))
    except (pickle.PicklingError, TypeError, AttributeError):  # an error whose details do not cross
        return pickle.dumps(Failure(rank, text, trace, None))


def _run_rank(rank: int, case: Case) -> RankResult:
    import torch
    from vllm.utils.import_utils import resolve_obj_by_qualname
    from vllm_omni.engine.stage_init_utils import set_death_signal
    from vllm_omni.platforms import current_omni_platform

    require("worker")
    set_death_signal(signal.SIGKILL)  # a test that is killed leaves no ranks behind
    torch.set_num_threads(1)
    if case.setup is not None:
        case.setup()
    config = _config(case)
    started = time.perf_counter()
    worker_class = resolve_obj_by_qualname(current_omni_platform.get_diffusion_worker_cls())
    worker = worker_class(local_rank=rank, rank=rank, od_config=config)
    loaded = time.perf_counter()
    answers = [_answer(worker, config, index, request, case) for index, request in enumerate(case.requests)]
    finished = time.perf_counter()
    probe = case.probe(worker.model_runner.pipeline) if case.probe else None
    result = RankResult(
        rank=rank,
        outputs=tuple(output for output, _ in answers),
        errors=tuple(error for _, error in answers),
        probe=probe,
        load_seconds=loaded - started,
        run_seconds=finished - loaded,
    )
    worker.shutdown()
    return result


def _config(case: Case) -> OmniDiffusionConfig:
    from vllm_omni.diffusion.data import OmniDiffusionConfig

    fields = {"dtype": "float32", "enforce_eager": True, **case.config}
    config = OmniDiffusionConfig.from_kwargs(model=case.model, **fields)
    # The configuration looks for a free port of its own; the ranks have to agree on one.
    config.master_port = case.port
    config.enrich_config()
    return config


def _answer(
    worker: Any, config: OmniDiffusionConfig, index: int, request: Request, case: Case
) -> tuple[Any, BaseException | None]:
    """Run one request; returns (output, None), or (None, error) if the case keeps going."""
    from vllm_omni.diffusion.request import OmniDiffusionRequest
    from vllm_omni.inputs.data import OmniDiffusionSamplingParams

    message = OmniDiffusionRequest(
        prompt=request.prompt,
        sampling_params=OmniDiffusionSamplingParams(**request.sampling),
        request_id=f"request-{index}",
    )
    try:
        output = worker.execute_model(message, config)
    except (PortKitError, ValueError, TypeError, RuntimeError, KeyError, OSError) as error:
        if not case.keep_going:
            raise
        return None, error
    if output.error:
        failure = RuntimeError(output.error)
        if not case.keep_going:
            raise failure
        return None, failure
    return output.output, None
