"""``port-kit uninstall NAME``: remove git code from this environment."""

from __future__ import annotations

import click

from port_kit.cli.output import emit, handles_errors, json_option
from port_kit.download.install import installed_names, uninstall_code
from port_kit.port import resolve
from port_kit.registry import list_ports


@click.command(
    "uninstall",
    epilog="Examples:  port-kit uninstall dreamid_omni  |  port-kit uninstall dreamid_omni_reference --json",
)
@click.argument("name")
@json_option
@handles_errors("uninstall")
def command(name: str, as_json: bool) -> None:
    """Remove the git code NAME, or all git code of the port NAME, from this Python environment."""
    removed = [path for code in _code_names(name) for path in uninstall_code(code)]
    emit("uninstall", {"name": name, "removed": removed}, as_json=as_json, text="\n".join(removed))


def _code_names(name: str) -> list[str]:
    """The code's own name, or the installed names of a port's recipe."""
    installed = installed_names()
    ports = list_ports()
    if name in installed or name not in ports:
        return [name]
    codes = [code.name for code in resolve(ports[name].recipe).code]  # type: ignore[attr-defined]
    return [code for code in codes if code in installed] or codes[:1] or [name]
