"""Self-check of the plugins in a fresh process: ``python -m port_kit.runtime.self_check REPORT``.

``port-kit doctor`` runs it in a child process, because loading vLLM-Omni takes many seconds, changes the process and
may fail. The result is written to REPORT as JSON, since vLLM logs to stdout.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from port_kit.errors import PortKitError
from port_kit.registry import list_ports


def run_self_check() -> dict[str, Any]:
    """Load vLLM-Omni with all plugins, as an engine does.

    Returns:
        ``platform`` (class path), ``output_types`` (by port, as a stage resolves them), ``registered`` (by port),
        ``upstream`` (by registry entry: the preconditions that do not hold).
    """
    from vllm_omni.diffusion.model_metadata import get_diffusion_model_metadata
    from vllm_omni.platforms import current_omni_platform
    from vllm_omni.plugins import load_omni_general_plugins

    ports = list_ports()
    platform = type(current_omni_platform)
    # before general plugins are loaded, as a stage resolves its modality
    types = {name: get_diffusion_model_metadata(port.class_name).final_output_type for name, port in ports.items()}
    load_omni_general_plugins()
    from vllm_omni.diffusion.registry import DiffusionModelRegistry

    registered = set(DiffusionModelRegistry.get_supported_archs())
    return {
        "platform": f"{platform.__module__}.{platform.__qualname__}",
        "output_types": types,
        "registered": {name: port.class_name in registered for name, port in ports.items()},
        "upstream": _upstream(),
    }


def _upstream() -> dict[str, list[str]]:
    """Check the preconditions of all registry entries."""
    from port_kit.upstream.checks import differences
    from port_kit.upstream.registry import REGISTRY

    return {name: [str(each) for each in differences(entry)] for name, entry in REGISTRY.items()}


def main(report: str) -> None:
    """Write the report, or the kit's error."""
    try:
        result = run_self_check()
    except PortKitError as error:
        result = {"error": {"code": error.code, "message": error.message, "hint": error.hint}}
    Path(report).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
