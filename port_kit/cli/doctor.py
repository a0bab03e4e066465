"""``port-kit doctor``: check that this environment can download, check and run ports."""

from __future__ import annotations

from dataclasses import asdict

import click

from port_kit.cli.output import emit, handles_errors, json_option
from port_kit.runtime.diagnose import Check, diagnose


@click.command("doctor", epilog="Examples:  port-kit doctor  |  port-kit doctor --no-engine --json")
@click.option("--engine/--no-engine", default=True, help="Load vLLM-Omni and its plugins in a child (some 20 s).")
@json_option
@handles_errors("doctor")
def command(engine: bool, as_json: bool) -> None:
    """Look at versions, plugins, platform, output types, patches, torchvision, bytecode, token, disk and git code.

    Exit with 1 if a check fails. The value of a token is never printed.
    """
    versions, checks = diagnose(engine=engine)
    data = {"versions": versions, "checks": [asdict(check) for check in checks]}
    emit("doctor", data, as_json=as_json, text=_text(versions, checks), ok=all(check.ok for check in checks))


def _text(versions: dict[str, str | None], checks: list[Check]) -> str:
    width = max(len(name) for name in [*versions, *(check.name for check in checks)])
    lines = [f"{name:<{width}}  {found or 'not installed'}" for name, found in versions.items()]
    lines.append("")
    for check in checks:
        lines.append(f"{check.name:<{width}}  {'ok  ' if check.ok else 'FAIL'}  {check.detail}")
        if not check.ok and check.hint:
            lines.append(f"{'':<{width}}        hint: {check.hint}")
    return "\n".join(lines)
