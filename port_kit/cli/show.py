"""``port-kit show PORT``: show the components and licenses of a port."""

from __future__ import annotations

import dataclasses
from typing import cast

import click

from port_kit.cli.output import emit, handles_errors, json_option
from port_kit.download import Recipe
from port_kit.port import Port, lookup, resolve
from port_kit.registry import find_port


@click.command("show", epilog="Examples:  port-kit show dreamid_omni  |  port-kit show dreamid_omni --json")
@click.argument("name", metavar="PORT")
@json_option
@handles_errors("show")
def command(name: str, as_json: bool) -> None:
    """Show one port: pipeline, components, licences, card."""
    port = find_port(name)
    recipe = cast(Recipe, resolve(port.recipe))
    data = {**dataclasses.asdict(port), "original": _original(port), "licences": recipe.licences}
    emit("show", data, as_json=as_json, text=_describe(port, recipe))


def _original(port: Port) -> str:
    return port.original if lookup(port.original) is not None else ""


def _describe(port: Port, recipe: Recipe) -> str:
    lines = [
        f"{port.name}: {port.title}",
        f"pipeline    {port.class_name} ({port.pipeline})",
        f"output      {port.output_type}",
        f"recipe      {port.recipe}",
        f"original    {_original(port) or 'none'}",
        f"card        {port.card}",
    ]
    lines += [f"variant     {name} ({recipe})" for name, recipe in port.variants.items()]
    lines += [f"component   {part.name}: {part.build}" for part in port.components]
    lines += [f"licence     {part}: {licence}" for part, licence in recipe.licences.items()]
    return "\n".join(lines)
