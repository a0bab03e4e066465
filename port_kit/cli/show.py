"""``port-kit show PORT``: show the components and licenses of a port."""

from __future__ import annotations

import dataclasses

import click

from port_kit.cli.output import emit, handles_errors, json_option
from port_kit.port import Port
from port_kit.registry import find_port


@click.command("show", epilog="Examples:  port-kit show dreamid_omni  |  port-kit show dreamid_omni --json")
@click.argument("name", metavar="PORT")
@json_option
@handles_errors("show")
def command(name: str, as_json: bool) -> None:
    """Show one port: pipeline, components, licences, card."""
    port = find_port(name)
    emit("show", dataclasses.asdict(port), as_json=as_json, text=_describe(port))


def _describe(port: Port) -> str:
    lines = [
        f"{port.name}: {port.title}",
        f"pipeline    {port.class_name} ({port.pipeline})",
        f"output      {port.output_type}",
        f"recipe      {port.recipe}",
        f"original    {port.original or 'none'}",
        f"card        {port.card}",
    ]
    lines += [f"variant     {name} ({recipe})" for name, recipe in port.variants.items()]
    lines += [f"component   {part.name}: {part.build}" for part in port.components]
    lines += [f"licence     {part}: {licence}" for part, licence in port.licences.items()]
    return "\n".join(lines)
