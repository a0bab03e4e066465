"""Ports: the data that declares one, and functions to find them.

A :class:`Port` holds strings and numbers only, so that listing ports, planning downloads and registering pipelines
import neither torch nor vLLM. Modules are named as ``"package.module:attribute"`` and imported on use.

Ports come from two places (:mod:`port_kit.registry`):

1. the entry-point group ``port_kit.ports`` (the shipped ports and any installed package),
2. the folders named in ``PORT_KIT_PATH`` (``os.pathsep``-separated; each holds packages with a ``PORT``).

Two different ports with the same name or pipeline class are both unavailable.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from port_kit.errors import OptionalDependencyError, PortKitError

#: Kinds of components: denoising transformers, encoders of conditioning, and VAEs with their vocoders.
KINDS = ("transformer", "encoder", "vae")


@dataclass(frozen=True)
class Component:
    """One part of a model: a folder of weights in the model directory and the module that they fill.

    Attributes:
        name: also the folder in the model directory and the attribute of the pipeline (``transformer``).
        build: ``"module:function"``; the function takes the component's configuration (a mapping, the content of
            ``<name>/config.json``) and returns the ``nn.Module`` on the current default device and dtype.
        rules: ``"module:attribute"`` of the :class:`~port_kit.remap.RuleSet` from original names to the module's.
        config: ``"module:attribute"`` of the full-size configuration (a mapping), as the recipe writes it.
        kind: one of :data:`KINDS`.
    """

    name: str
    build: str
    rules: str
    config: str
    kind: str = "transformer"


@dataclass(frozen=True)
class Port:
    """A model brought to vLLM-Omni.

    Attributes:
        name: the name on the command line (``dreamid_omni``).
        title: one line for users.
        class_name: ``_class_name`` in ``model_index.json``, the key under which the pipeline is registered.
        pipeline: ``"module:Class"`` of the pipeline.
        output_type: the stage's modality, ``video`` for video with or without audio.
        references: kinds of reference media that requests may have, ``image`` and ``audio``, for servers.
        pre_process: name of the factory of the function that preprocesses requests in the engine process, or empty.
        post_process: name of the post-process factory in the pipeline's module, as in vLLM-Omni's registry.
        recipe: ``"module:attribute"`` of the :class:`~port_kit.download.Recipe`.
        variants: recipes of further checkpoints for the same pipeline, by name; the default's is one of them.
        components: the weights, in loading order.
        parity: ``"module:function"`` that lists the port's golden cases, or empty.
        original: ``"module:attribute"`` of the :class:`~port_kit.parity.OriginalImplementation` that
            ``verify parity --reference`` runs, or empty.
        parallel: ``"module:function"`` that takes a scratch folder and returns the tiny
            :class:`~port_kit.parallel.verify.ParallelTestCase` that ``verify parallel`` runs, or empty.
        request_options: ``extra_args`` that requests may set, each with its type: ``str``, ``int`` or ``float``.
        example_prompt: prompt of ``port-kit generate`` without ``--prompt``.
        seed: of ``port-kit generate`` without ``--seed``.
        tiny: sampling parameters for the tiny checkpoint.
        card: path of the port's card in the repository.
        licences: licenses of weights and code: ``{part: license}``.
    """

    name: str
    title: str
    class_name: str
    pipeline: str
    output_type: str
    recipe: str
    components: tuple[Component, ...]
    references: tuple[str, ...] = ()
    pre_process: str = ""
    post_process: str = "get_post_process_func"
    variants: Mapping[str, str] = field(default_factory=dict)
    parity: str = ""
    original: str = ""
    parallel: str = ""
    request_options: Mapping[str, str] = field(default_factory=dict)
    example_prompt: str = ""
    seed: int = 0
    tiny: Mapping[str, Any] = field(default_factory=dict)
    card: str = ""
    licences: Mapping[str, str] = field(default_factory=dict)

    def component(self, name: str) -> Component:
        """Return the component called ``name``; raise :class:`PortKitError` with the names that exist."""
        for component in self.components:
            if component.name == name:
                return component
        known = [component.name for component in self.components]
        raise PortKitError(
            f"port {self.name} has no component {name!r}",
            code="port_invalid",
            hint=f"use one of {', '.join(known)}",
        )


def resolve(reference: str) -> object:
    """Import ``"package.module:attribute"`` and return the attribute.

    Raises:
        OptionalDependencyError: the module needs a package that is not installed.
    """
    module_name, _, attribute = reference.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in ("", module_name.partition(".")[0]):
            raise
        raise OptionalDependencyError(
            f"{reference} needs the package {missing!r}, which is not installed",
            hint="install the runtime: pip install 'port-kit[omni]' (on a machine without a GPU: 'port-kit[omni,cpu]')",
        ) from error
    return getattr(module, attribute)
