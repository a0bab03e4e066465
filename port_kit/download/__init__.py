"""From a recipe to a complete model directory: plan, fetch, verify, convert, git code, assemble, lock.

>>> from port_kit.download import Recipe, download
>>> report = download(Recipe.from_toml("my_model.toml"), "models/my_model")     # doctest: +SKIP
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from port_kit.download.http import Policy
from port_kit.download.recipe import FileRule, GitCode, Recipe, Repository
from port_kit.download.run import Report, download

if TYPE_CHECKING:
    from port_kit.checkpoint.convert import Conversion, convert_file

__all__ = ["Conversion", "FileRule", "GitCode", "Policy", "Recipe", "Report", "Repository", "convert_file", "download"]


def __getattr__(name: str) -> Any:
    """Import the conversion, which has the pickle reader behind it, when it is asked for: not for every download."""
    if name in ("Conversion", "convert_file"):
        from port_kit.checkpoint import convert

        return getattr(convert, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
