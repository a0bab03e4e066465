"""Client errors at vLLM-Omni's entry points; see ``refused_request`` and ``malformed_forms`` in ``patches.md``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from types import SimpleNamespace
from typing import Any

from vllm_omni.engine.messages import ErrorMessage, OutputMessage
from vllm_omni.errors import OmniClientError, is_client_error_status

from port_kit.errors import PortKitError
from port_kit.escape import reason_of


class RefusedRequests(OmniClientError):
    """Some requests of a list were refused, and the others were served.

    Attributes:
        refused: errors of the refused requests, by index in the list.
        results: results of the others, by index.
    """

    def __init__(self, refused: Mapping[int, OmniClientError], results: Mapping[int, Any]) -> None:
        self.refused, self.results = dict(sorted(refused.items())), dict(sorted(results.items()))
        lines = [f"{len(refused)} of {len(refused) + len(results)} requests were refused; results has the others"]
        lines += [f"request {index}: {error}" for index, error in self.refused.items()]
        super().__init__("\n".join(lines))


def keep_engine_on_client_error(generate: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``Omni.generate`` so that the engine stays open, and other requests run on, after a client error.

    Upstream's list form closes the engine on any error, and its generator form aborts the other requests. The wrapper
    builds the list from the generator form, and closes the engine on all errors except ``OmniClientError``.
    """

    @wraps(generate)
    def run(
        self: Any, prompts: Any, sampling_params_list: Any = None, *, py_generator: bool = False, use_tqdm: Any = True
    ) -> Any:
        if getattr(self, "_shutdown_called", False):
            raise PortKitError(
                "generate was called after close", code="engine_closed", hint="create another Omni for more requests"
            )
        outputs = generate(self, prompts, sampling_params_list, py_generator=True, use_tqdm=use_tqdm)
        if py_generator:
            return outputs
        refused: dict[int, OmniClientError] = {}
        with _collected_errors(self, refused):
            try:
                finished = list(outputs)
            except OmniClientError:
                raise
            except BaseException:
                self.close()
                raise
        if refused and not finished and len(refused) == 1:
            raise refused[0]
        if refused:
            raise RefusedRequests(refused, {_index(output.request_id): output for output in finished})
        return finished

    return run


def _index(request_id: str) -> int:
    """Return the index of a request in its list, which starts the identity that ``Omni`` gives it."""
    return int(request_id.partition("_")[0])


@contextmanager
def _collected_errors(omni: Any, refused: dict[int, OmniClientError]) -> Iterator[None]:
    """Collect client errors of requests by index while the others run on; drop those of earlier calls."""
    read, check, process = omni.engine.try_get_output, omni._check_engine_output_error, omni._process_single_result

    def read_errors_as_outputs(*arguments: Any, **keywords: Any) -> Any:
        message = read(*arguments, **keywords)
        if not isinstance(message, ErrorMessage) or message.fatal or not is_client_error_status(message.status_code):
            return message
        if message.request_id not in omni.request_states:
            return None
        error = SimpleNamespace(
            error=message.error, error_status_code=message.status_code, error_type=message.error_type, finished=True
        )
        return OutputMessage(
            request_id=message.request_id, stage_id=message.stage_id or 0, engine_outputs=error, finished=True
        )

    def collect(result: Any, request_id: str, stage_id: int) -> None:
        try:
            check(result, request_id, stage_id)
        except OmniClientError as error:
            if not result.finished:
                raise
            refused[_index(request_id)] = error
            omni._record_request_failure_once(request_id, reason="stage_error")

    def process_others(*arguments: Any, result: Any, **keywords: Any) -> Any:
        if _index(result.request_id) in refused:
            return None
        return process(*arguments, result=result, **keywords)

    omni.engine.try_get_output = read_errors_as_outputs
    omni._check_engine_output_error, omni._process_single_result = collect, process_others
    try:
        yield
    finally:
        del omni.engine.try_get_output, omni._check_engine_output_error, omni._process_single_result


def as_client_error(parse: Callable[..., Any], kind: type[Exception], message: str = "") -> Callable[..., Any]:
    """Wrap ``parse`` to raise ``OmniClientError`` (status 400) in place of errors of class ``kind``."""

    @wraps(parse)
    def run(*arguments: Any, **keywords: Any) -> Any:
        try:
            return parse(*arguments, **keywords)
        except kind as error:
            raise OmniClientError(message or reason_of(error)) from error

    return run
