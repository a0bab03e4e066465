"""``python -m port_kit.docgen [DOCS]``: write the generated pages into a folder, by default that of this repository."""

from __future__ import annotations

import sys
from pathlib import Path

from port_kit.docgen.commands import cli_page
from port_kit.docgen.errors import troubleshooting_page
from port_kit.parallel.layout import Layout
from port_kit.reports import layout_svg

#: The layout that docs/parallel.md shows.
LAYOUT = "tp2xulysses2xcfg2"


def layout_picture() -> str:
    """Draw :data:`LAYOUT`."""
    return layout_svg(Layout.parse(LAYOUT))


PAGES = {"cli.md": cli_page, "troubleshooting.md": troubleshooting_page, "pictures/layout.svg": layout_picture}


def main(folder: Path) -> None:
    """Write all pages."""
    for name, build in PAGES.items():
        (folder / name).write_text(build(), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[2] / "docs")
