"""Pipelines of ports whose transformer is an unmodified module of another repository, adapted by a plan.

The port has the pipeline; the transformer is built on the meta device, adapted by the plan of the port, and filled from
its checkpoint, which has the names of the module::

    class MyPipeline(PlannedComponents, PromptPipeline):
        components = COMPONENTS
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from vllm_omni.diffusion.data import OmniDiffusionConfig

from port_kit.autoparallel.host.adapt import Adapted, adapt
from port_kit.autoparallel.host.checks import UNPROVEN, check_plan
from port_kit.autoparallel.host.loading import load_denoiser
from port_kit.autoparallel.plan import Plan
from port_kit.autoparallel.ports import plan_file
from port_kit.pipeline.component_pipeline import ComponentPipeline
from port_kit.pipeline.finite import check_weights
from port_kit.pipeline.loading import build_components, load_component_weights
from port_kit.pipeline.media import to_omni_payload
from port_kit.pipeline.model_index import port_of_model
from port_kit.port import resolve
from port_kit.registry import port_of_class

#: Options of the engine that no plan proves; the request loop of the kit has step execution.
_UNPROVEN = tuple(option for option in UNPROVEN if option != "step_execution")


class PlannedComponents(ComponentPipeline):
    """A pipeline of which the transformers are adapted by the plan of the port.

    Attributes:
        adapted: changes that the plan made in each transformer.
        computed: calls of the transformers; for tests and reports.
    """

    adapted: dict[str, Adapted]
    computed: float

    def build_components(self, model: str) -> dict[str, nn.Module]:
        """Build the components; adapt the transformers, whose parameters stay on the meta device."""
        from accelerate import init_empty_weights

        port = port_of_model(model)
        plan, self.adapted, self.computed = Plan.load(plan_file(port)), {}, 0.0
        transformers = [component for component in self.components if component.kind == "transformer"]
        built = build_components(model, [component for component in self.components if component not in transformers])
        with init_empty_weights(include_buffers=False):
            built |= build_components(model, transformers)
        for component in transformers:
            module = built[component.name]
            self.adapted[component.name] = adapt(module, plan, self.od_config, component.name, port.replace)
            module.register_forward_pre_hook(self._count)
        return {component.name: built[component.name] for component in self.components}

    def _count(self, *_: Any) -> None:
        self.computed += 1

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Fill the transformers by the rules of the plan, and the other components by those of the port."""
        others = [component for component in self.components if component.name not in self.adapted]
        loaded = load_component_weights(self, others, weights, self.od_config.model)
        for name, adapted in self.adapted.items():
            module: nn.Module = getattr(self, name)
            folder = Path(self.od_config.model) / name
            load_denoiser(module, folder, adapted.rules, self.od_config, self.device)
            loaded |= {f"{name}.{key}" for key in module.state_dict()}
        check_weights(self, self.od_config.model)
        return loaded


def get_post_process_func(od_config: OmniDiffusionConfig) -> Callable[[Any], Any]:
    """Return the function that makes vLLM-Omni's payload; check the engine's options before workers start.

    Raises:
        ParallelError: ``plan_layout``; the plan does not prove the engine's layout.
    """
    port = port_of_class(od_config.model_class_name)
    pipeline: Any = resolve(port.pipeline)
    check_plan(od_config, port.name, _UNPROVEN)

    def post_process(output: dict[str, Tensor]) -> dict[str, Any]:
        return to_omni_payload(output, fps=pipeline.fps, sample_rate=pipeline.audio_sample_rate)

    return post_process
