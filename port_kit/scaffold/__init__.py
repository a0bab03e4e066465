"""Write a port from templates: ``port-kit new``.

>>> from port_kit.scaffold import NewPort, new_port
>>> new_port(NewPort("my_model", "custom", Path("my_model")))                     # doctest: +SKIP
"""

from __future__ import annotations

from pathlib import Path

from port_kit.scaffold.render import write_files
from port_kit.scaffold.request import PATHS, NewPort, PortPath

__all__ = ["NewPort", "PATHS", "PortPath", "new_port"]


def new_port(port: NewPort) -> list[Path]:
    """Write a port's folder; return its files.

    Raises:
        ScaffoldError: the folder is not empty, or the model cannot be adapted.
        OptionalDependencyError: diffusers is needed for the answer and not installed.
    """
    from port_kit.scaffold.diffusers_port import diffusers_files

    if port.path == "diffusers":
        return write_files(port.target, diffusers_files(port))
    from port_kit.scaffold.own_port import own_files

    return write_files(port.target, own_files(port))
