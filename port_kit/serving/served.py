"""Facts about the served model that the gateway checks requests against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from port_kit.errors import PortNotFoundError
from port_kit.port import Port, resolve
from port_kit.registry import port_of_class
from port_kit.runtime.hosts import HOSTS

#: References of a request, images and audios together, as in vLLM-Omni's server.
MAX_REFERENCES = 12


@dataclass(frozen=True)
class Served:
    """The model of a server.

    Attributes:
        port: None for a model that is no port of the kit.
        output_type: of its stage, ``video``, ``image`` or ``audio``.
        fps: frames per second of a video.
        frames: number of frames of every video; None if requests choose it.
        frame_step: requests choose 1 and a multiple of it, at least one; None if that is not known.
        settings: seed and steps of a request that gives none.
    """

    port: Port | None
    output_type: str
    fps: float = 0
    frames: int | None = None
    frame_step: int | None = None
    settings: tuple[tuple[str, Any], ...] = ()

    @property
    def options(self) -> tuple[str, ...] | None:
        """Names that ``extra_params`` may have; None if they are not known."""
        return None if self.port is None else self.port.option_names

    @property
    def max_references(self) -> int:
        """Number of references that vLLM-Omni's server passes on: several kinds as a list, else one image."""
        kinds = () if self.port is None else self.port.references
        return MAX_REFERENCES if len(kinds) > 1 else len(kinds)


def served_by(config: Any) -> Served:
    """Describe the model of an engine.

    Args:
        config: ``OmniDiffusionConfig`` of the engine.
    """
    try:
        port = port_of_class(config.model_class_name)
    except PortNotFoundError:
        return Served(None, HOSTS.get(config.model_class_name, ""))
    pipeline: Any = resolve(port.pipeline)
    steps = getattr(pipeline, "default_num_inference_steps", None)
    settings = (("seed", port.seed), ("num_inference_steps", steps))
    reader = pipeline.for_preprocessing(config.model) if hasattr(pipeline, "for_preprocessing") else None
    return Served(
        port,
        port.output_type,
        fps=getattr(pipeline, "fps", 0),
        frames=getattr(reader, "fixed_frames", None),
        frame_step=getattr(getattr(pipeline, "options", None), "frame_step", None),
        settings=settings,
    )
