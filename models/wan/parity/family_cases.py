"""Golden cases of the DreamID-Omni and Ovi family in a goldens folder, in the order in which a pipeline computes.

Folder layout (``SET.json`` holds all dimensions)::

    SET.json  ckpts/  scheduler/  umt5/  wan_vae/  mmaudio/  fusion/<case>/  e2e_<model>/  e2e_media/
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from port_kit.errors import ParityError
from port_kit.models.wan.parity import component_cases, transformer_cases
from port_kit.parity import Case


def family_cases(goldens: Path) -> Iterator[Case]:
    """Yield the cases that the ports share: components first, then the fusion transformer.

    Raises:
        ParityError: the folder has no ``SET.json``.
    """
    if not (goldens / "SET.json").is_file():
        raise ParityError(
            f"{goldens} has no SET.json",
            code="goldens_invalid",
            hint="give the folder with SET.json, ckpts/ and one folder per component",
        )
    yield from component_cases.cases(goldens)
    yield from transformer_cases.cases(goldens)
