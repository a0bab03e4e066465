"""Ports with a parallel plan: their lookup by class, and their plan files."""

from __future__ import annotations

import importlib
from pathlib import Path

from port_kit.errors import PortKitError
from port_kit.port import HostedPort, Port
from port_kit.registry import list_ports


def planned_port(class_name: str | None) -> Port | None:
    """Return the port with a plan whose pipeline has this class name, or None."""
    return next((port for port in list_ports().values() if port.class_name == class_name and port.plan), None)


def hosted_port(class_name: str | None) -> HostedPort | None:
    """Return the port that runs a pipeline of diffusers under this class name, or None."""
    port = planned_port(class_name)
    return port if isinstance(port, HostedPort) else None


def plan_file(port: Port) -> Path:
    """Return the path of a port's plan.

    Raises:
        PortKitError: ``port_invalid``; the package has no such file.
    """
    package = Path(str(importlib.import_module(port.package).__file__)).parent
    path = package / port.plan
    if not path.is_file():
        raise PortKitError(
            f"port {port.name}: expected a plan in {path}, found no file",
            code="port_invalid",
            hint=f"port-kit plan infer SUBJECT -o {path}, then port-kit plan prove {path} --write",
        )
    return path
