"""Declaration of a port's original implementation."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from port_kit.errors import ParityError


@dataclass(frozen=True)
class OriginalImplementation:
    """The original implementation of a port, and the script that runs it.

    Attributes:
        git_code: name of the :class:`~port_kit.download.GitCode` of the port's recipe; empty if the code is only
            given as a folder.
        script: ``package.module`` of the script. It is run by path, as ``python -I SCRIPT REQUEST.json``, in the
            original's environment: it may import the original's requirements and must not import port_kit.
            The default records components and their modules: :mod:`port_kit.parity.run_modules`.
        options: added to the request.

    The request holds ``path`` (folders that make the original importable), ``folder`` (its checkout), ``model``,
    ``output``, ``precision`` (``fp32`` or ``bf16``), ``device``, ``seed``, and ``options``. The script writes cases
    and at last ``SET.json`` into ``output``, laid out as the port's ``parity`` function reads them; its output
    is kept in a log. With several precisions it is run once for each, into the same folder.
    """

    git_code: str = ""
    script: str = "port_kit.parity.run_modules"
    options: Mapping[str, Any] = field(default_factory=dict)

    def script_file(self) -> Path:
        """Return the script's file, found without importing it or its package's contents.

        Raises:
            ParityError: there is no such module.
        """
        package, _, name = self.script.rpartition(".")
        spec = importlib.util.find_spec(package) if package else None
        for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
            path = Path(folder) / f"{name}.py"
            if path.is_file():
                return path
        raise ParityError(
            f"the script {self.script} of the original implementation is not a module of an installed package",
            code="reference_missing",
            hint="correct the `script` of the port's ORIGINAL",
        )
