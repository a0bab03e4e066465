"""HTML pages of parity and coverage, drawings of parallel layouts, contact sheets.

Pages are self-contained: they have no scripts and load no external fonts or images.
"""

from port_kit.reports.contact_sheet import draw_contact_sheet, draw_overview
from port_kit.reports.coverage import coverage_page
from port_kit.reports.html import write_page
from port_kit.reports.layouts import layout_svg, layout_text
from port_kit.reports.parity import parity_page

__all__ = [
    "coverage_page",
    "draw_contact_sheet",
    "draw_overview",
    "layout_svg",
    "layout_text",
    "parity_page",
    "write_page",
]
