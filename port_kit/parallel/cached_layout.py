"""Names of layouts with Cache-DiT: ``cache_dit`` on one rank, ``cache_ditxulysses2`` on two."""

from __future__ import annotations

from port_kit.parallel.layout import Layout

CACHE = "cache_dit"


def split_cache(text: str) -> tuple[bool, Layout]:
    """Return True if a layout has Cache-DiT, and the layout without it.

    Raises:
        ParallelError: ``parallel_degree``; the rest is not a layout.
    """
    if text.partition("x")[0] != CACHE:
        return False, Layout.parse(text)
    rest = text.partition("x")[2]
    return True, Layout.parse(rest) if rest else Layout()


def with_cache(layout: Layout) -> str:
    """Return the name of a layout with Cache-DiT."""
    return CACHE if not layout.degrees else f"{CACHE}x{layout}"
