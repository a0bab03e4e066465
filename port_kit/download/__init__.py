"""From a recipe to a whole model directory: plan, fetch, verify, convert, git code, assemble, lock."""

from __future__ import annotations

from port_kit.download.recipe import FileRule, GitCode, Recipe, Repository

__all__ = ["FileRule", "GitCode", "Recipe", "Repository"]
