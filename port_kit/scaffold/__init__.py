"""Write a port from templates: ``port-kit new``.

>>> from port_kit.scaffold import NewPort, new_port
>>> new_port(NewPort("my_model", "custom", Path("my_model")))                     # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from port_kit.port import resolve
from port_kit.scaffold.render import write_files
from port_kit.scaffold.request import PATHS, NewPort, PortPath

__all__ = ["NewPort", "PATHS", "PortPath", "new_port", "port_files"]


def port_files(port: NewPort, report: Callable[[str], None] = print) -> dict[str, str]:
    """Return the files of a port of own code by their paths: of an inspected model, or of the skeleton.

    Raises:
        ScaffoldError: the model cannot be adapted.
    """
    if port.sources:
        from port_kit.scaffold.found_port import found_files

        return found_files(port, report)
    from port_kit.scaffold.own_port import own_files

    return own_files(port)


def new_port(port: NewPort, report: Callable[[str], None] = print) -> list[Path]:
    """Write a port's folder; return its files.

    Args:
        port: the request.
        report: receives a line per step of the inference of a plan.

    Raises:
        ScaffoldError: the folder is not empty, or the model cannot be adapted.
        ParallelError: no plan can be inferred for the class of the transformer.
        OptionalDependencyError: diffusers is needed for the answer and not installed.
    """
    if port.path == "diffusers":
        hosted: Any = resolve("port_kit.scaffold.hosted_port:hosted_files")
        return write_files(port.target, hosted(port, report))
    written = write_files(port.target, port_files(port, report))
    if port.path == "external" and not port.sources:
        from port_kit.scaffold.external_plan import write_plan

        written.append(write_plan(port, report))
    return written
