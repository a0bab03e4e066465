"""What the kit changes on the client's side of an engine; see ``refused_request`` in ``patches.md``."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from typing import Any

from vllm_omni.errors import OmniClientError


def keeping_engine(generate: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``Omni.generate`` that leaves the engine open where a request was refused for its own fault.

    Upstream's closes the engine on any error of a list call. Its generator form closes nothing, so the list is made
    from that, and the engine is closed here on every error but a refusal.
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
