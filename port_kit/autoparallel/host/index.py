"""The ``model_index.json`` of a diffusers pipeline: its class, its denoisers, and the kind of its output."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from port_kit.autoparallel.ports import hosted_port
from port_kit.errors import InspectError
from port_kit.escape import quoted
from port_kit.inspect.components import is_denoiser
from port_kit.pipeline.model_index import read_json

#: Fields of a pipeline's output class, and the modality that they stand for.
_MODALITIES = {"frames": "video", "images": "image", "audios": "audio"}
#: Frames per second of pipelines that name none.
DEFAULT_FPS = 24.0


@dataclass(frozen=True)
class PipelineIndex:
    """Index of a pipeline directory.

    Attributes:
        folder: the directory; that of a port names the port's class in its index.
        pipeline_class: class of diffusers.
        components: class name per component; those that are absent are left out.
    """

    folder: Path
    pipeline_class: type[Any]
    components: Mapping[str, str]

    @classmethod
    def read(cls, folder: Path | str) -> PipelineIndex:
        """Read a directory.

        Raises:
            PortKitError: ``model_incomplete``; it has no readable index.
            InspectError: ``inspect_target``; diffusers has no such class, or the pipeline has no denoiser.
        """
        return cls.from_index(Path(folder), read_json(folder, "model_index.json"))

    @classmethod
    def from_index(cls, folder: Path, index: Mapping[str, Any]) -> PipelineIndex:
        """Read the content of ``model_index.json``.

        Raises:
            InspectError: ``inspect_target``; diffusers has no such class, or the pipeline has no denoiser.
        """
        import diffusers

        name = index.get("_class_name")
        port = hosted_port(str(name))
        pipeline_class = getattr(diffusers, port.hosted if port else str(name), None)
        if not isinstance(pipeline_class, type):
            raise InspectError(
                f"{folder}: diffusers {diffusers.__version__} has no pipeline class {quoted(name)}",
                hint="name a directory that diffusers' DiffusionPipeline.from_pretrained can load",
            )
        found = {key: value[1] for key, value in index.items() if _is_component(value)}
        result = cls(folder, pipeline_class, found)
        if not result.denoisers:
            raise InspectError(
                f"{folder}: {name} has no component named transformer or unet",
                hint="run it with diffusers, or write a port: port-kit new",
            )
        return result

    @property
    def denoisers(self) -> list[str]:
        """Names of the components that guidance calls."""
        return [name for name in self.components if is_denoiser(name)]

    def component_class(self, name: str) -> type[Any]:
        """Return the class of diffusers of a component."""
        import diffusers

        found: type[Any] = getattr(diffusers, self.components[name])
        return found

    @property
    def output_type(self) -> str:
        """Modality of the output: ``video`` (with or without audio), ``image`` or ``audio``.

        Raises:
            InspectError: ``inspect_target``; the pipeline's module names no output class that is known.
        """
        module = sys.modules[self.pipeline_class.__module__]
        fields: set[str] = set()
        for value in vars(module).values():
            if isinstance(value, type) and value.__name__.endswith("Output"):
                fields |= set(getattr(value, "__dataclass_fields__", {}))
        for field, modality in _MODALITIES.items():
            if field in fields:
                return modality
        raise InspectError(
            f"{self.pipeline_class.__name__}: the kind of its output is unknown",
            hint="write a port: port-kit new",
        )

    @property
    def fps(self) -> float:
        """Frames per second of a video whose request gives none: the default of the pipeline, or 24."""
        rate = self.parameters.get("frame_rate")
        return float(rate.default) if rate is not None and isinstance(rate.default, int | float) else DEFAULT_FPS

    @property
    def parameters(self) -> Mapping[str, inspect.Parameter]:
        """Parameters of the pipeline's call."""
        found = dict(inspect.signature(self.pipeline_class.__call__).parameters)
        del found["self"]
        return found


def _is_component(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[1], str)
