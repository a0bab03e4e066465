"""Pipelines of vLLM-Omni that host diffusers pipelines: the names under which they are registered.

``Omni(model=DIR, model_class_name="PortKitVideoPipeline")`` runs the diffusers pipeline in ``DIR``. A class per kind of
output is needed because vLLM-Omni looks the kind up by the name of the class.
"""

from __future__ import annotations

#: Module of the pipelines.
MODULE = "port_kit.autoparallel.host.pipeline"
#: Output modality by class.
HOSTS = {"PortKitImagePipeline": "image", "PortKitVideoPipeline": "video", "PortKitAudioPipeline": "audio"}


def host_of(output_type: str) -> str:
    """Return the name of the class for an output modality."""
    return next(name for name, kind in HOSTS.items() if kind == output_type)
