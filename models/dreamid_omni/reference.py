"""How DreamID-Omni's original code is run for ``port-kit verify parity dreamid_omni --reference``."""

from __future__ import annotations

from port_kit.reference import Reference

REFERENCE = Reference(
    git_code="dreamid_omni_reference",
    script="port_kit.models.wan.parity.original_runner",
    options={"family": "dreamid_omni", "package": "dreamid_omni"},
)
