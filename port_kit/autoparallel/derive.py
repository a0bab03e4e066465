"""Objects whose methods are overridden without a change of their class."""

from __future__ import annotations

from typing import Any


def derive(instance: Any, methods: dict[str, Any]) -> None:
    """Give an object a subclass of its class that overrides methods and has the same name."""
    base = type(instance)
    derived: Any = type(base.__name__, (base,), {"__module__": base.__module__, "__doc__": base.__doc__, **methods})
    derived.__qualname__ = base.__qualname__
    instance.__class__ = derived
