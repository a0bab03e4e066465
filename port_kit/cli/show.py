"""``port-kit show``: the components and licenses of a port, or the settings of a clip."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import cast

import click

from port_kit.cli.output import emit, handles_errors, json_option
from port_kit.clips import ClipSettings, read_settings
from port_kit.clips.settings import CARRIERS
from port_kit.download import Recipe
from port_kit.port import Port, lookup, resolve
from port_kit.registry import find_port


@click.command("show", epilog="Examples:  port-kit show dreamid_omni  |  port-kit show clip.mp4 --json")
@click.argument("name", metavar="PORT_OR_CLIP")
@json_option
@handles_errors("show")
def command(name: str, as_json: bool) -> None:
    """Show one port: pipeline, components, licences, card. Of a clip (.mp4, .wav, .png): the settings that made it."""
    if Path(name).suffix in CARRIERS:
        settings = read_settings(Path(name))
        emit("show", settings.to_json(), as_json=as_json, text=_describe_clip(name, settings))
        return
    port = find_port(name)
    recipe = cast(Recipe, resolve(port.recipe))
    data = {**dataclasses.asdict(port), "original": _original(port), "licences": recipe.licences}
    emit("show", data, as_json=as_json, text=_describe(port, recipe))


def _describe_clip(path: str, clip: ClipSettings) -> str:
    rows = [
        ("port", clip.port or "none: port-kit run"),
        ("model", " ".join([clip.model.get("name", ""), clip.model.get("content", "")[:16]])),
    ]
    rows += clip.request.items()
    for kind, references in clip.references.items():
        rows += [(kind, " ".join([item.name or "drawn by a script", item.sha256[:16]])) for item in references]
    rows += [(f"engine {name}", value) for name, value in clip.engine.items()]
    rows += [(f"version {name}", value) for name, value in clip.versions.items()]
    width = max(len(name) for name, _ in rows) + 2
    lines = [f"{name:{width}}{value}".rstrip() for name, value in rows]
    if clip.port:
        again = f"port-kit generate {clip.port} --model DIR --from-clip {path} -o again{Path(path).suffix}"
        lines += ["", f"to repeat it: {again}"]
    return "\n".join(lines)


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
