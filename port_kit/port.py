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
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from port_kit.errors import OptionalDependencyError, PortKitError
from port_kit.escape import quoted

_Module = TypeVar("_Module")
#: Kinds of components: denoising transformers, encoders of conditioning, VAEs with their vocoders, and partners, which
#: several transformers call and none of them owns.
KINDS = ("transformer", "encoder", "vae", "partner")
#: Kinds that compute in every denoising step.
DENOISERS = ("transformer", "partner")
#: ``extra_args`` that the request loop reads for each modality: they come from the endpoints of vLLM-Omni's server.
SERVER_OPTIONS: Mapping[str, tuple[str, ...]] = {
    "video": ("video_codec_options",),
    "image": (),
    "audio": ("audio_length", "audio_start_in_s", "audio_end_in_s"),
}


@dataclass(frozen=True)
class Component:
    """One part of a model: a folder of weights in the model directory and the module that they fill.

    Attributes:
        name: also the folder in the model directory and the attribute of the pipeline (``transformer``).
        package: package that holds the module, the rules and the configuration under their usual names, which the next
            three attributes may replace.
        build: ``"module:function"``; the function takes the component's configuration (a mapping, the content of
            ``<name>/config.json``) and returns the ``nn.Module`` on the current default device and dtype.
            Default: ``"<package>.model.<name>:build_<name>"``.
        rules: ``"module:attribute"`` of the :class:`~port_kit.remap.RuleSet` from original names to the module's.
            Default: ``"<package>.weights:<NAME>"``.
        config: ``"module:attribute"`` of the full-size configuration (a mapping), as the recipe writes it.
            Default: ``"<package>.config:<NAME>_CONFIG"``.
        kind: one of :data:`KINDS`.
    """

    name: str
    package: str = ""
    build: str = ""
    rules: str = ""
    config: str = ""
    kind: str = "transformer"

    def __post_init__(self) -> None:
        usual = {
            "build": f"{self.package}.model.{self.name}:build_{self.name}",
            "rules": f"{self.package}.weights:{self.name.upper()}",
            "config": f"{self.package}.config:{self.name.upper()}_CONFIG",
        }
        _fill_in(self, usual, self.package, f"component {self.name}")


@dataclass(frozen=True)
class Pretrained:
    """One part of a model that its own library builds and fills, with ``from_pretrained``.

    Attributes:
        name: also the folder in the model directory and the attribute of the pipeline (``vae``).
        source: ``"module:Class"`` of the class (``"diffusers:AutoencoderKL"``).
        kind: one of :data:`KINDS`.
    """

    name: str
    source: str
    kind: str


@dataclass(frozen=True)
class Port:
    """A model brought to vLLM-Omni.

    Attributes:
        name: the name on the command line (``dreamid_omni``).
        package: the port's package, ``__name__`` in its ``__init__.py``. It holds the modules ``config``, ``recipe``,
            ``weights`` and ``pipeline``, where the entries below are unless they are given.
        title: one line for users.
        class_name: ``_class_name`` in ``model_index.json``, the key under which the pipeline is registered.
        output_type: the stage's modality: ``video``, with or without audio, ``image``, or ``audio`` alone.
        components: the weights, in loading order.
        pipeline: ``"module:Class"`` of the pipeline. Default: ``"<package>.pipeline:<class_name>"``.
        recipe: ``"module:attribute"`` of the :class:`~port_kit.download.Recipe`.
            Default: ``"<package>.recipe:RECIPE"``.
        variants: recipes of further checkpoints for the same pipeline, by name; the default's is one of them. A value
            without a module is an attribute of the recipe's module.
        guidance_branches: calls of the transformer per guided step: 2 with a prompt and a negative prompt, 1 without
            guidance. Checks of layouts and of caches read it.
        references: kinds of reference media that requests may have, ``image`` and ``audio``, for servers.
        first_frame: True if a reference image is the first frame of the video, so that a request can continue a clip.
        timeline_guides: True if requests may have vLLM-Omni's timeline guides in ``multi_modal_data``; the pipeline
            checks them.
        post_process: ``"module:function"`` of a factory that replaces
            :func:`~port_kit.pipeline.process_funcs.get_post_process_func`, or empty.
        parity: ``"module:function"`` that lists the port's golden cases; empty for those of a recorded
            :attr:`original`.
        request_options: ``extra_args`` that requests may set, each with its type: ``str``, ``int`` or ``float``.
        more_options: further ``extra_args`` that requests may set, without an option on the command line.
        example_prompt: prompt of ``port-kit generate`` without ``--prompt``.
        seed: of ``port-kit generate`` without ``--seed``.
        tiny: sampling parameters for the tiny model.
        tiny_model: ``"module:attribute"`` of the tiny model: a mapping from folders of the model directory to their
            tiny parts, or a function; see :mod:`port_kit.testing.tiny_port`. Default: ``"<package>.config:TINY"``.
        trained_model: a tiny model with trained weights, in the form of :attr:`tiny_model`; empty if there is none.
        parallel: sampling parameters of ``verify parallel``, beside those of :attr:`tiny`.
        output_tolerance: largest absolute difference between outputs of the tiny model on N ranks and on one; decoders
            amplify rounding. Of integer outputs, beyond one count.
        card: path of the port's card in the repository.
        plan: file in the package with the parallel plan of an unmodified transformer; empty if the port's own code is
            parallel.
        replace: hand-written modules of a transformer with a plan, ``{pattern of modules: "module:Class"}``; see
            :mod:`port_kit.autoparallel.replace`.
    """

    name: str
    package: str
    title: str
    class_name: str
    output_type: str
    components: tuple[Component, ...]
    pipeline: str = ""
    recipe: str = ""
    variants: Mapping[str, str] = field(default_factory=dict)
    guidance_branches: int = 2
    references: tuple[str, ...] = ()
    first_frame: bool = False
    timeline_guides: bool = False
    post_process: str = ""
    parity: str = ""
    request_options: Mapping[str, str] = field(default_factory=dict)
    more_options: tuple[str, ...] = ()
    example_prompt: str = ""
    seed: int = 0
    tiny: Mapping[str, Any] = field(default_factory=dict)
    tiny_model: str = ""
    trained_model: str = ""
    parallel: Mapping[str, Any] = field(default_factory=lambda: {"num_inference_steps": 1})
    output_tolerance: float = 5e-3
    card: str = ""
    plan: str = ""
    replace: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        usual = {
            "pipeline": f"{self.package}.pipeline:{self.class_name}",
            "recipe": f"{self.package}.recipe:RECIPE",
            "tiny_model": f"{self.package}.config:TINY",
        }
        if self.plan:
            usual["post_process"] = "port_kit.autoparallel.planned:get_post_process_func"
        _fill_in(self, usual, self.package, f"port {self.name}")
        module = self.recipe.partition(":")[0]
        variants = {name: entry if ":" in entry else f"{module}:{entry}" for name, entry in self.variants.items()}
        object.__setattr__(self, "variants", variants)

    @property
    def option_names(self) -> tuple[str, ...] | None:
        """All ``extra_args`` that requests may set, by servers too; None if only the pipeline knows them."""
        return tuple(dict.fromkeys((*self.request_options, *self.more_options, *SERVER_OPTIONS[self.output_type])))

    @property
    def original(self) -> str:
        """Entry of the port's :class:`~port_kit.parity.OriginalImplementation`, ``ORIGINAL`` beside the recipe."""
        return f"{self.recipe.partition(':')[0]}:ORIGINAL"

    def component(self, name: str) -> Component:
        """Return the component called ``name``; raise :class:`PortKitError` with the names that exist."""
        for component in self.components:
            if component.name == name:
                return component
        known = [component.name for component in self.components]
        raise PortKitError(
            f"port {self.name} has no component {quoted(name)}",
            code="port_invalid",
            hint=f"use one of {', '.join(known)}",
        )


#: Modules of the kit that run pipelines of diffusers.
_HOST, _TINY = "port_kit.autoparallel.host", "port_kit.autoparallel.tiny_pipelines.port"


@dataclass(frozen=True)
class HostedPort(Port):
    """A port that runs a pipeline of diffusers unchanged; a plan adapts its denoisers.

    The package needs no code of its own: the pipeline, the rules and the tiny model are the kit's unless they are
    given.

    Attributes:
        components: default: the denoisers, with the configurations of the package.
        parallel: as in :class:`Port`.
        plan: as in :class:`Port`.
        hosted: class of the pipeline in diffusers (``LTXPipeline``).
        denoisers: components that guidance calls.
    """

    components: tuple[Component, ...] = ()
    parallel: Mapping[str, Any] = field(default_factory=dict)
    plan: str = "plan.toml"
    hosted: str = ""
    denoisers: tuple[str, ...] = ("transformer",)

    def __post_init__(self) -> None:
        build, rules = f"{_HOST}.loading:build_component", f"{_HOST}.adapt:SAME_NAMES"
        usual = {
            "components": tuple(Component(name, self.package, build, rules) for name in self.denoisers),
            "pipeline": f"{_HOST}.pipeline:PortKit{self.output_type.capitalize()}Pipeline",
            "post_process": f"{_HOST}.pipeline:get_post_process_func",
            "tiny_model": f"{_TINY}:tiny_model",
        }
        _fill_in(self, usual, self.package, f"port {self.name}")
        super().__post_init__()

    @property
    def option_names(self) -> None:
        """None: the options are the parameters of the pipeline of diffusers."""
        return None


def _fill_in(declared: object, usual: Mapping[str, object], package: str, title: str) -> None:
    """Give the empty entries of a frozen dataclass their usual values."""
    missing = [name for name in usual if not getattr(declared, name)]
    if missing and not package:
        raise PortKitError(
            f"{title} has neither a package nor an entry for {', '.join(missing)}",
            code="port_invalid",
            hint="give the package, whose modules have the usual names, or every entry",
        )
    for name in missing:
        object.__setattr__(declared, name, usual[name])


def lookup(reference: str) -> object | None:
    """Return what :func:`resolve` returns, or None if the module or its attribute does not exist."""
    module_name, _, attribute = reference.partition(":")
    try:
        return getattr(importlib.import_module(module_name), attribute, None)
    except ModuleNotFoundError as error:
        if error.name != module_name and not module_name.startswith(f"{error.name}."):
            raise
        return None


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
            f"{reference} needs the package {quoted(missing)}, which is not installed",
            hint="install the runtime: pip install 'port-kit[omni]' (on a machine without a GPU: 'port-kit[omni,cpu]')",
        ) from error
    return getattr(module, attribute)


def build_module(kind: type[_Module], config: Mapping[str, Any], **given: Any) -> _Module:
    """Build a module from its configuration.

    Args:
        kind: class of the module.
        config: further keyword arguments of it, such as a ``config.json``.
        given: keyword arguments that are not in the configuration.

    Raises:
        PortKitError: ``component_config``; the keys of the configuration are not the parameters of the class.
    """
    parameters = inspect.signature(kind).parameters
    named = {
        name: item for name, item in parameters.items() if item.kind in (item.POSITIONAL_OR_KEYWORD, item.KEYWORD_ONLY)
    }
    missing = [name for name, item in named.items() if item.default is item.empty and name not in {*config, *given}]
    takes_any = any(item.kind is item.VAR_KEYWORD for item in parameters.values())
    unknown = [key for key in config if key not in named and not takes_any]
    if missing or unknown:
        raise PortKitError(
            f"the configuration of {kind.__name__} does not have its parameters; missing: "
            f"{', '.join(missing) or 'none'}; unknown: {', '.join(unknown) or 'none'}",
            code="component_config",
            hint=f"correct the configuration in config.py, or the parameters of {kind.__name__}",
        )
    return kind(**config, **given)
