"""From a recipe to a whole model directory: plan, fetch, verify, convert, git code, assemble, lock.

>>> from port_kit.download import Recipe, download
>>> report = download(Recipe.from_toml("my_model.toml"), "models/my_model")     # doctest: +SKIP
"""

from __future__ import annotations

from port_kit.download.convert import Conversion, convert_file
from port_kit.download.http import Policy
from port_kit.download.recipe import FileRule, GitCode, Recipe, Repository
from port_kit.download.run import Report, download

__all__ = ["Conversion", "FileRule", "GitCode", "Policy", "Recipe", "Report", "Repository", "convert_file", "download"]
