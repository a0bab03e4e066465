"""How Ovi's original code is run for ``port-kit verify parity ovi --reference``."""

from __future__ import annotations

from port_kit.reference import Reference

REFERENCE = Reference(
    git_code="ovi_reference",
    script="port_kit.models.wan.parity.original_runner",
    options={"family": "ovi", "package": "ovi"},
)
