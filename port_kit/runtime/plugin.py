"""Entry points for vLLM-Omni: ports as pipelines, and the CPU platform.

vLLM-Omni calls these through the entry points in ``setup.cfg``, in each process, in this order:

=============================  ==========================  ================================================
entry-point group              function                    when
=============================  ==========================  ================================================
``vllm_omni.platform_plugins`` :func:`announce_ports`      while ``vllm_omni`` is imported
``vllm_omni.platform_plugins`` :func:`cpu_platform`        while ``vllm_omni`` is imported
``vllm.general_plugins``       :func:`register_metadata`   ``vllm serve``, before it builds its configuration
``vllm_omni.general_plugins``  :func:`register_pipelines`  when an engine, a stage or a worker starts
=============================  ==========================  ================================================

vLLM-Omni resolves a stage's output modality before it loads general plugins. Without the earlier entry points, a port
would be an image stage, and ``/v1/videos`` would reject requests.

This module is imported at each start of vLLM, so it imports neither torch nor vLLM at module level.
"""

from __future__ import annotations

import logging
from importlib.util import find_spec

from port_kit.errors import RegistrationError
from port_kit.escape import quoted
from port_kit.port import Port
from port_kit.registry import list_ports
from port_kit.runtime.hosts import HOSTS, MODULE

logger = logging.getLogger(__name__)

PLATFORM = "port_kit.runtime.platform.CpuOmniPlatform"
#: Module in which vLLM-Omni finds the pipeline classes and the process functions of all ports.
PIPELINES = "port_kit.pipeline.process_funcs"
PLATFORM_GROUP = "vllm_omni.platform_plugins"

#: Non-empty while other plugins are called; prevents infinite recursion.
_asking: list[bool] = []


def cpu_platform() -> str | None:
    """Return the class path of the CPU platform, or None if another platform is available.

    The platform is offered only if vLLM is a CPU build and no other installed plugin supplies a platform:
    ``import vllm_omni`` fails if two out-of-tree platforms are offered.
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
    """Return True if another plugin supplies a platform; ignore failing and excluded (``VLLM_PLUGINS``) plugins."""
    from vllm_omni.plugins import load_omni_plugins_by_group

    plugins = load_omni_plugins_by_group(PLATFORM_GROUP).values()
    return any(_answer(plugin) for plugin in plugins if getattr(plugin, "__module__", "") != __name__)


def _answer(plugin: object) -> str | None:
    """Call a platform plugin as vLLM-Omni does; return None if it raises."""
    if not callable(plugin):
        return None
    try:
        return plugin()
    except (ImportError, AttributeError, OSError, RuntimeError, ValueError, TypeError):
        return None


def announce_ports() -> None:
    """Declare the output modality of all ports while vLLM-Omni is imported; supply no platform.

    Also name damaged indexes: the module that reads them is not imported yet.

    vLLM-Omni's platform detection suppresses errors here; :func:`register_pipelines` raises them again.
    """
    from port_kit.runtime.patches import name_damaged_indexes

    name_damaged_indexes()
    _declare_output_types()


def register_metadata() -> None:
    """Declare each port's output modality (``video`` includes video with audio) and reference media. Idempotent.

    A no-op if vLLM is installed without vLLM-Omni.

    Raises:
        RegistrationError: ``upstream_changed``.
    """
    if find_spec("vllm_omni") is None:
        return
    _declare_output_types()
    from port_kit.runtime.patches import declare_references, map_malformed_form_errors

    for port in list_ports().values():
        declare_references(port.class_name, port.references, guides=port.timeline_guides)
    map_malformed_form_errors()


def _declare_output_types() -> None:
    """Declare the output modality of all ports and hosts; safe during the import of vLLM-Omni."""
    from port_kit.runtime.patches import declare_output_type

    for port in list_ports().values():
        declare_output_type(port.class_name, port.output_type)
    for name, output_type in HOSTS.items():
        declare_output_type(name, output_type)


def register_pipelines() -> None:
    """Register all ports' pipelines under their ``_class_name``, the hosts, and their metadata. Idempotent.

    Raises:
        RegistrationError: the installed vLLM-Omni is not supported, or a port's declaration is invalid.
    """
    from port_kit.runtime.patches import install_client_error_handling, label_audio_results
    from port_kit.upstream.checks import require
    from port_kit.upstream.series import check_version

    check_version()
    require("registration")
    show_info_with_the_engines()
    install_client_error_handling()
    label_audio_results()
    register_metadata()
    for problem in list_ports().problems:
        # vLLM-Omni then reports a model of such a port as unknown
        logger.error("%s [%s]; %s", problem.message, problem.code, problem.hint)
    for port in list_ports().values():
        _register(port)
    for name in HOSTS:
        _register_host(name)


def show_info_with_the_engines() -> None:
    """Print the kit's INFO records where vLLM prints its own, if it does. Idempotent.

    Without this, engine processes print the kit's warnings and errors only: they configure the loggers of vLLM alone.
    A process that configured the root logger keeps what it chose.
    """
    kit, engine = logging.getLogger("port_kit"), logging.getLogger("vllm")
    if logging.getLogger().handlers or kit.handlers or not engine.isEnabledFor(logging.INFO):
        return
    kit.setLevel(engine.level)
    for handler in engine.handlers:
        kit.addHandler(handler)


def _register_host(name: str) -> None:
    """Register a pipeline that hosts diffusers pipelines."""
    from vllm_omni.diffusion.registry import register_diffusion_model

    register_diffusion_model(
        model_arch=name,
        module_name=MODULE,
        class_name=name,
        pre_process_func_name="get_pre_process_func",
        post_process_func_name="get_post_process_func",
    )


def _register(port: Port) -> None:
    """Register one port. Keyword arguments, because their order differs between releases.

    vLLM-Omni looks for the process functions in the module of the pipeline, which is :data:`PIPELINES` for all ports.
    """
    from vllm_omni.diffusion.registry import register_diffusion_model

    module, _, class_name = port.pipeline.partition(":")
    if not module or not class_name:
        raise RegistrationError(
            f"Port {port.name}: expected pipeline 'package.module:Class', got {quoted(port.pipeline)}.",
            code="port_unregistrable",
            hint="correct the pipeline field of the port",
            port=port.name,
        )
    register_diffusion_model(
        model_arch=port.class_name,
        module_name=PIPELINES,
        class_name=port.class_name,
        pre_process_func_name="get_pre_process_func",
        post_process_func_name="get_post_process_func",
    )
