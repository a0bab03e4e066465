"""Client errors at vLLM-Omni's entry points; see ``refused_request`` and ``malformed_forms`` in ``patches.md``."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from typing import Any

from vllm_omni.errors import OmniClientError


def keep_engine_on_client_error(generate: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``Omni.generate`` so that the engine stays open after a client error.

    Upstream's list form closes the engine on any error, the generator form does not. The wrapper builds the list from
    the generator form, and closes the engine on all errors except ``OmniClientError``.
    """

    @wraps(generate)
    def run(
        self: Any, prompts: Any, sampling_params_list: Any = None, *, py_generator: bool = False, use_tqdm: Any = True
    ) -> Any:
        outputs = generate(self, prompts, sampling_params_list, py_generator=True, use_tqdm=use_tqdm)
        if py_generator:
            return outputs
        with ExitStack() as on_error:
            on_error.callback(self.close)
            try:
                finished = list(outputs)
            except OmniClientError:
                on_error.pop_all()
                raise
            on_error.pop_all()
            return finished

    return run


def as_client_error(parse: Callable[..., Any], kind: type[Exception], message: str = "") -> Callable[..., Any]:
    """Wrap ``parse`` to raise ``OmniClientError`` (status 400) in place of errors of class ``kind``."""

    @wraps(parse)
    def run(*arguments: Any, **keywords: Any) -> Any:
        try:
            return parse(*arguments, **keywords)
        except kind as error:
            raise OmniClientError(message or str(error)) from error

    return run
