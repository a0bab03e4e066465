"""``port-kit layout``: draw a parallel layout."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from port_kit.cli.output import emit, handles_errors, json_option
from port_kit.parallel.layout import Layout
from port_kit.reports import layout_svg, layout_text, write_page
from port_kit.reports.layouts import places

#: Ranks of a drawing.
MAX_RANKS = 4096


@click.command(
    "layout",
    epilog="Examples:  port-kit layout tp2xulysses2  |  port-kit layout ulysses2xring2xcfg2 --svg layout.svg",
)
@click.argument("layout")
@click.option("--svg", type=click.Path(path_type=Path), help="Also write the drawing to this file.")
@json_option
@handles_errors("layout")
def command(layout: str, svg: Path | None, as_json: bool) -> None:
    """Draw LAYOUT (tp2, ulysses2xring2, hsdp2xcfg2 ...): the work of each rank, in vLLM-Omni's numbering."""
    parsed = Layout.parse(layout)
    if parsed.world > MAX_RANKS:
        raise click.BadParameter(f"{parsed.world} ranks; at most {MAX_RANKS} are drawn", param_hint="LAYOUT")
    if svg is not None:
        write_page(svg, layout_svg(parsed))
    data = {
        "layout": str(parsed),
        "world": parsed.world,
        "parallel_config": parsed.parallel_config,
        "ranks": [asdict(place) for place in places(parsed)],
    }
    emit("layout", data, as_json=as_json, text=layout_text(parsed))
