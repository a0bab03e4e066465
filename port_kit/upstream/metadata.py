"""Capabilities in vLLM-Omni's metadata of pipelines."""

from __future__ import annotations

from port_kit.upstream.checks import require
from port_kit.upstream.series import installed_series


def timeline_guides(accepted: bool) -> dict[str, bool]:
    """Return the field of ``DiffusionModelMetadata`` for timeline guides; 0.30 has neither guides nor field.

    Raises:
        RegistrationError: ``upstream_changed``.
    """
    require("timeline_guides")
    return {} if installed_series() == "0.30" else {"supports_timeline_guides": accepted}
