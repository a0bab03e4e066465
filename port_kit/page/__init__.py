"""A web page for a port: its request fields, progress, and the clips, over a server of the port.

``port-kit page PORT`` opens it. The page is built from what the port declares, so that a new port needs no code.
"""

from __future__ import annotations

import importlib.util

from port_kit.errors import InputError, OptionalDependencyError
from port_kit.port import Port


def check_page(port: Port) -> None:
    """Check that a page of a port can be built.

    Raises:
        OptionalDependencyError: gradio is not installed.
        InputError: the port makes no videos.
    """
    if importlib.util.find_spec("gradio") is None:
        raise OptionalDependencyError(
            "the page needs gradio, which is not installed", hint="pip install 'port-kit[page]'"
        )
    if port.output_type != "video":
        raise InputError(
            f"port {port.name} makes {port.output_type}; pages are for ports that make videos",
            hint="use port-kit generate",
        )
