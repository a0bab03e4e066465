"""Types of the fixtures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from port_kit.inspect import Inspection
from tests.inspect.fake_repositories import Files

Folder = Callable[[Files], Path]
Remote = Callable[..., Inspection]
