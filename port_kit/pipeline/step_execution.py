"""Step execution: one denoising step of every running request at a time.

A request may then join while others run, and leave between two steps. The engine keeps a ``StepRequestState`` for each
request and calls ``prepare_encode`` once, ``denoise_step`` for all of them together, ``step_scheduler`` for each, and
``post_decode`` at the end.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from vllm_omni.diffusion.request import OmniDiffusionRequest

from port_kit.errors import InputError
from port_kit.pipeline.inputs import to_client_error
from port_kit.upstream.checks import require

if TYPE_CHECKING:
    from vllm_omni.diffusion.data import DiffusionOutput
    from vllm_omni.diffusion.worker.input_batch import InputBatch
    from vllm_omni.diffusion.worker.utils import StepRequestState

    from port_kit.pipeline.request_state import DenoiseState, PreparedRequest
    from port_kit.runtime.progress import Reporter

require("step_execution")

#: Keys in the engine's ``StepRequestState.extra``: the denoising states of a request, and their predictions.
STATES, FLOWS = "port_kit_states", "port_kit_flows"

Flows = tuple[Tensor, ...]


class StepExecution:
    """The four methods that step execution calls, in terms of the request loop of a pipeline."""

    supports_step_execution: ClassVar[bool] = True
    reporter: Reporter

    @abstractmethod
    def prepared(self, layout: Any, prompt: Any, sampling: Any, *, is_dummy_run: bool) -> PreparedRequest:
        """Return the checked request with its decoded media."""

    @abstractmethod
    def begin(self, prepared: PreparedRequest) -> list[DenoiseState]:
        """Encode what a request gives and draw its noise."""

    @abstractmethod
    def predict(self, states: Sequence[DenoiseState]) -> list[Flows]:
        """Return the guided flows of each state's next step."""

    @abstractmethod
    def scheduler_step(self, state: DenoiseState, guided: Flows) -> None:
        """Make a state's step."""

    @abstractmethod
    def postprocess(self, states: Sequence[DenoiseState]) -> DiffusionOutput:
        """Decode what a request asked for."""

    def prepare_encode(self, state: StepRequestState, **_: Any) -> StepRequestState:
        """Take a request in.

        Raises:
            OmniClientError: it cannot be served; the others run on.
        """
        self.reporter.report({state.request_id: (0, 0)})
        is_dummy_run = OmniDiffusionRequest.is_dummy_run_request_id(state.request_id)
        try:
            prepared = self.prepared(state.prepared_layout, state.prompt, state.sampling, is_dummy_run=is_dummy_run)
            states = self.begin(prepared)
        except InputError as error:
            raise to_client_error(error) from error
        state.extra[STATES] = states
        self.reporter.report({state.request_id: states[0].steps_done})
        # Solvers differ in the dtype of their timesteps; the engine requires one dtype per step.
        state.timesteps = states[0].timesteps.float()
        # The engine concatenates the latents of all requests, which fails for unequal sizes, and does not read the
        # result. It gets a placeholder; :meth:`predict` batches states that fit together.
        state.latents = torch.zeros(1, 1, device=states[0].timesteps.device)
        return state

    def denoise_step(
        self, input_batch: InputBatch, *, states: Sequence[StepRequestState] | None = None, **_: Any
    ) -> None:
        """Predict the flows of every running request's next step; they stay in the requests' states."""
        running = input_batch.states if states is None else states
        flows = iter(self.predict([own for state in running for own in state.extra[STATES]]))
        for state in running:
            state.extra[FLOWS] = [next(flows) for _ in state.extra[STATES]]

    def step_scheduler(self, state: StepRequestState, noise_pred: Tensor | None, **_: Any) -> None:
        """Make one request's step."""
        for denoise_state, guided in zip(state.extra[STATES], state.extra.pop(FLOWS), strict=True):
            self.scheduler_step(denoise_state, guided)
        self.reporter.report({state.request_id: state.extra[STATES][0].steps_done})
        state.step_index += 1

    def post_decode(self, state: StepRequestState, **_: Any) -> DiffusionOutput:
        """Decode a request that has made all its steps."""
        return self.postprocess(state.extra.pop(STATES))
