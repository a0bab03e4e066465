"""Selection of the configuration that a component of a port is built with to compare it with a checkpoint.

A checkpoint may be smaller than the published one: its ``config.json`` lies beside it. A file there is the component's
if it has the keys of the port's own configuration; a file of the original implementation usually has others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from port_kit.checkpoint.configuration import config_beside, read_config
from port_kit.errors import RemapError
from port_kit.escape import quoted
from port_kit.port import Component, Port, resolve

FULL_SIZE = "full size"
#: Value of ``--config`` that selects the port's own configuration.
FULL = "full"


@dataclass(frozen=True)
class ComponentConfig:
    """A component's configuration and the name of its file."""

    values: Mapping[str, Any]
    origin: str


@dataclass(frozen=True)
class Choice:
    """The selected configuration, None for full size, and the reason that a file beside the checkpoint is not used."""

    config: ComponentConfig | None
    note: str = ""


def component_config(component: Component) -> Mapping[str, Any]:
    """Return the component's full-size configuration."""
    config: Any = resolve(component.config)
    return config


def choose_config(port: Port, name: str, *, given: str | None = None, source: str | None = None) -> Choice:
    """Select a configuration: the given one, that beside the checkpoint, or full size.

    Args:
        port: the port.
        name: the component.
        given: ``full``, a ``config.json``, the folder with it, or a model directory.
        source: the checkpoint, as a command line names it.

    Raises:
        RemapError: ``component_config`` if the given file lacks keys of the component's configuration,
            ``manifest_invalid`` if it cannot be read.
    """
    component = port.component(name)
    if given == FULL:
        return Choice(None)
    if given is not None:
        path = Path(given) / name if (Path(given) / name).is_dir() else Path(given)
        config = ComponentConfig(read_config(path), str(path))
        problem = _mismatch(component, config)
        if problem:
            raise RemapError(problem, code="component_config", hint=f"give another file, or --config {FULL}")
        return Choice(config)
    beside = config_beside(source) if source else None
    if beside is None:
        return Choice(None)
    config = ComponentConfig(beside[1], beside[0])
    problem = _mismatch(component, config)
    return Choice(None, f"{problem}; the target has {FULL_SIZE}") if problem else Choice(config)


def _mismatch(component: Component, config: ComponentConfig) -> str:
    """Return why a file is not a configuration of the component, or an empty string.

    A class name decides where both have one: libraries add keys with every release.
    """
    full = component_config(component)
    key = "_class_name"
    if key in full:
        expected, found = full[key], config.values.get(key)
        same = expected == found
        return "" if same else f"{config.origin} is not a configuration of {expected}: its {key} is {quoted(found)}"
    missing = [name for name in full if name not in config.values]
    if not missing:
        return ""
    return f"{config.origin} is not a configuration of the port's {component.name}: it lacks {', '.join(missing)}"
