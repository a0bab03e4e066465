"""``port-kit list``: the ports of this environment."""

from __future__ import annotations

import click

from port_kit.cli.output import emit, handles_errors, json_option
from port_kit.registry import list_ports


@click.command("list", epilog="Examples:  port-kit list  |  port-kit list --json")
@json_option
@handles_errors("list")
def command(as_json: bool) -> None:
    """List the ports that are shipped, installed or found through PORT_KIT_PATH.

    Exits with 1 if a port is broken, and prints the reason.
    """
    ports = list_ports()
    for problem in ports.problems:
        click.echo(f"error [{problem.code}]: {problem.message}\nhint: {problem.hint}\n", err=True)
    width = max((len(name) for name in ports), default=0)
    text = "\n".join(f"{name:<{width}}  {port.title}" for name, port in ports.items())
    titles = {name: port.title for name, port in ports.items()}
    emit("list", titles, as_json=as_json, text=text or "no ports", ok=not ports.problems)
