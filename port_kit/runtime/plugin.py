"""The kit's entry points into vLLM-Omni: ports as pipelines, and the CPU as a platform.

vLLM-Omni calls these by the entry points in ``setup.cfg``, in every process, in this order:

=============================  ==========================  ================================================
entry-point group              function                    when
=============================  ==========================  ================================================
``vllm_omni.platform_plugins`` :func:`announce_ports`      while ``vllm_omni`` is imported
``vllm_omni.platform_plugins`` :func:`cpu_platform`        the same
``vllm.general_plugins``       :func:`register_metadata`   ``vllm serve``, before it builds its configuration
``vllm_omni.general_plugins``  :func:`register_pipelines`  when an engine, a stage or a worker starts
=============================  ==========================  ================================================

Two are early for one reason: vLLM-Omni resolves a stage's output modality before it loads general plugins, so a
port that is only registered there would be an image stage, and ``/v1/videos`` would refuse it.

This module is imported at every start of vLLM on any machine: it imports nothing heavy itself.
"""

from __future__ import annotations

import logging
from importlib.util import find_spec

from port_kit.errors import RegistrationError
from port_kit.port import Port, list_ports

logger = logging.getLogger(__name__)

PLATFORM = "port_kit.runtime.platform.CpuOmniPlatform"
PLATFORM_GROUP = "vllm_omni.platform_plugins"

#: Holds while the other plugins are asked: one that asks others in its turn must not ask for ever.
_asking: list[bool] = []


def cpu_platform() -> str | None:
    """Offer the CPU platform; return its class path, or None where this machine has another one.

    It is offered only where vLLM itself is its CPU build and no other installed plugin supplies a platform:
    two out-of-tree platforms that both answer make ``import vllm_omni`` fail.
    """
    from vllm.platforms import current_platform

    if _asking or not current_platform.is_cpu():
        return None
    _asking.append(True)
    try:
        return None if _other_platform_answers() else PLATFORM
    finally:
        _asking.clear()


def _other_platform_answers() -> bool:
    """Ask the other platform plugins; those that ``VLLM_PLUGINS`` excludes or that fail do not count."""
    from vllm_omni.plugins import load_omni_plugins_by_group

    plugins = load_omni_plugins_by_group(PLATFORM_GROUP).values()
    return any(_answer(plugin) for plugin in plugins if getattr(plugin, "__module__", "") != __name__)


def _answer(plugin: object) -> str | None:
    """Call a platform plugin as vLLM-Omni does: a plugin that raises does not offer a platform."""
    if not callable(plugin):
        return None
    try:
        return plugin()
    except (ImportError, AttributeError, OSError, RuntimeError, ValueError, TypeError):
        return None


def announce_ports() -> None:
    """Declare every port's output modality while vLLM-Omni is being imported; supplies no platform.

    Failures here are swallowed by vLLM-Omni's platform detection; :func:`register_pipelines` meets them again
    and raises.
    """
    _declare_output_types()


def register_metadata() -> None:
    """Tell vLLM-Omni what each port puts out (``video`` covers video with sound), and what it can be sent.

    Does nothing in an environment with vLLM but without vLLM-Omni. May run any number of times.

    Raises:
        RegistrationError: vLLM-Omni no longer keeps these facts where the kit declares them.
    """
    if find_spec("vllm_omni") is None:
        return
    _declare_output_types()
    from port_kit.runtime.patches import declare_references, map_malformed_form_errors

    for port in list_ports().values():
        declare_references(port.class_name, port.references)
    map_malformed_form_errors()


def _declare_output_types() -> None:
    """Declare what ports put out; all that this imports of vLLM-Omni is loaded while vLLM-Omni itself still is not."""
    from port_kit.runtime.patches import declare_output_type

    for port in list_ports().values():
        declare_output_type(port.class_name, port.output_type)


def register_pipelines() -> None:
    """Register every port's pipeline under its ``_class_name``, and its modality. May run any number of times.

    Raises:
        RegistrationError: vLLM-Omni has a version that the kit was not proven on, or did not take a port.
    """
    from port_kit.runtime.patches import install_client_error_handling
    from port_kit.runtime.upstream_checks import check_version

    check_version()
    install_client_error_handling()
    register_metadata()
    for problem in list_ports().problems:
        # Every process of the engine says so; a model of such a port is then an unknown one to vLLM-Omni.
        logger.error("%s [%s]; %s", problem.message, problem.code, problem.hint)
    for port in list_ports().values():
        _register(port)


def _register(port: Port) -> None:
    """Hand one port to the registry; by keywords, because their order changed between releases."""
    from vllm_omni.diffusion.registry import register_diffusion_model

    module, _, class_name = port.pipeline.partition(":")
    if not module or not class_name:
        raise RegistrationError(
            f"port {port.name} gives its pipeline as {port.pipeline!r}; 'package.module:Class' is required",
            code="port_unregistrable",
            hint="correct the port's declaration",
            port=port.name,
        )
    register_diffusion_model(
        model_arch=port.class_name,
        module_name=module,
        class_name=class_name,
        pre_process_func_name=port.pre_process or None,
        post_process_func_name=port.post_process or None,
    )
