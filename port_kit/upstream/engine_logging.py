"""Log handlers of vLLM in a process that is not one of its servers.

0.30 installs them when vLLM is imported. 0.32 installs them in its own commands and engine processes only; in other
processes Python's handler of last resort prints warnings and errors, at any ``VLLM_LOGGING_LEVEL``.
"""

from __future__ import annotations

from importlib import import_module

from port_kit.upstream.checks import is_needed, require


def install_handlers() -> None:
    """Install the handlers that the ``VLLM_*`` variables describe. Idempotent.

    Raises:
        RegistrationError: ``upstream_changed``.
    """
    if is_needed("engine_logging"):
        require("engine_logging")
        config = import_module("vllm.config").LoggingConfig()
        import_module("vllm.logger").configure_logging_if_needed(config)
