"""port_kit: bring diffusion models with scattered checkpoints and custom code to vLLM-Omni, out of tree.

Importing the package needs neither torch nor vLLM; subpackages that need them raise a clear error if they are missing.
"""

from importlib.metadata import PackageNotFoundError, version

from port_kit.errors import (
    DownloadError,
    InputError,
    OptionalDependencyError,
    ParallelError,
    ParityError,
    PortKitError,
    PortNotFoundError,
    RegistrationError,
    RemapError,
)
from port_kit.port import Component, Port
from port_kit.registry import find_port, list_ports

try:
    __version__ = version("port-kit")
except PackageNotFoundError:  # imported from a folder of sources
    __version__ = "0+unknown"

__all__ = [
    "Component",
    "DownloadError",
    "InputError",
    "OptionalDependencyError",
    "ParallelError",
    "ParityError",
    "Port",
    "PortKitError",
    "PortNotFoundError",
    "RegistrationError",
    "RemapError",
    "find_port",
    "list_ports",
]
