"""``port-kit remove DIR``: remove a downloaded model directory."""

from __future__ import annotations

from pathlib import Path

import click

from port_kit.cli.output import emit, handles_errors, json_option
from port_kit.download.remove import remove


@click.command(
    "remove",
    epilog="Examples:  port-kit remove /models/dreamid_omni  |  port-kit remove ./dreamid_omni --json",
)
@click.argument("directory", type=click.Path(path_type=Path))
@json_option
@handles_errors("remove")
def command(directory: Path, as_json: bool) -> None:
    """Delete the files that DIRECTORY's port.lock names; anything else stays."""
    done = remove(directory, lambda text: click.echo(text, err=True))
    data = {"directory": str(done.directory), "removed": done.removed, "left": done.left, "gone": done.gone}
    text = f"{len(done.removed)} files removed from {done.directory}"
    if done.left:
        text += f"; left, because port-kit did not put them there: {', '.join(done.left[:8])}"
    emit("remove", data, as_json=as_json, text=text)
