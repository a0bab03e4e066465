"""Small configurations and inputs of the transformer classes of diffusers.

:data:`CASES` maps the name of a class to a function that returns its :class:`~port_kit.autoparallel.subject.Subject`.
"""

from __future__ import annotations

from collections.abc import Callable

from port_kit.autoparallel.subject import Subject

CASES: dict[str, Callable[[], Subject]] = {}
