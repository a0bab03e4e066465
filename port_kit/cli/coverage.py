"""``port-kit coverage``: check that a rule set maps a checkpoint completely to a module, from headers alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from port_kit.cli.inputs import config_option, read_rules, read_sizes, read_source, read_target, wrapper_option
from port_kit.cli.output import emit, handles_errors, json_option
from port_kit.port import Port, resolve
from port_kit.registry import find_port
from port_kit.remap.coverage import Coverage, coverage
from port_kit.reports import coverage_page, write_page


@click.command(
    "coverage",
    epilog="Examples:  port-kit coverage --source transformer/ --port dreamid_omni --component transformer  |  "
    "port-kit coverage --source S.json --target T.json --rules rules.toml --html coverage.html",
)
@click.option("--source", required=True, help="A manifest, a checkpoint, or a Hub repository OWNER/NAME[@REV][:PATH].")
@click.option("--target", help="A manifest or checkpoint with the names to be filled.")
@click.option("--rules", help="A .toml or .json file of rules, or module:ATTRIBUTE.")
@click.option("--port", help="Take target and rules of this port.")
@click.option("--component", help="The port's component; without it SOURCE is a model directory with one folder each.")
@click.option("--size", "sizes", multiple=True, metavar="NAME=N", help="A named size of the rules.")
@config_option
@wrapper_option
@click.option("--allow-downcast", is_flag=True, help="Allow rounding to a narrower floating-point dtype.")
@click.option(
    "--no-cache",
    "build",
    is_flag=True,
    help="Build the port's modules; ignore the manifest cache.",
)
@click.option("--html", type=click.Path(path_type=Path), help="Also write the report to this file.")
@json_option
@handles_errors("coverage")
def command(
    source: str,
    target: str | None,
    rules: str | None,
    port: str | None,
    component: str | None,
    sizes: tuple[str, ...],
    config: str | None,
    wrapper: str,
    allow_downcast: bool,
    build: bool,
    html: Path | None,
    as_json: bool,
) -> None:
    """Account for every element of SOURCE and of the target; exit code 1 on any gap."""
    numbers = read_sizes(sizes)
    if port is None:
        if target is None or rules is None:
            raise click.UsageError("give --target and --rules, or --port")
        report = coverage(
            read_rules(rules),
            read_source(source, wrapper=wrapper),
            read_source(target),
            numbers,
            allow_downcast=allow_downcast,
        )
        _write_page(html, source, {"": report})
        emit("coverage", report.to_json(), as_json=as_json, text=report.to_text(), ok=report.ok)
        return
    if target is not None:
        raise click.UsageError("--target and --port exclude each other")
    found = find_port(port)
    names = [component] if component else [part.name for part in found.components]
    sources = {name: source if component else str(Path(source) / name) for name in names}
    settings = _Settings(rules, numbers, wrapper, allow_downcast, build, config)
    reports = {name: _of_component(found, name, sources[name], settings) for name in names}
    _write_page(html, found.name, reports)
    if component:
        report = reports[component]
        emit("coverage", report.to_json(), as_json=as_json, text=report.to_text(), ok=report.ok)
        return
    data = {"ok": all(report.ok for report in reports.values())}
    parts = {name: report.to_json() for name, report in reports.items()}
    text = "\n\n".join(f"== {name}\n{report.to_text()}" for name, report in reports.items())
    emit("coverage", {**data, "components": parts}, as_json=as_json, text=text, ok=data["ok"])


def _write_page(path: Path | None, title: str, reports: Mapping[str, Coverage]) -> None:
    if path is not None:
        write_page(path, coverage_page(title, {name: report.to_json() for name, report in reports.items()}))


@dataclass(frozen=True)
class _Settings:
    """Options of the comparison with a component of a port."""

    rules: str | None
    sizes: dict[str, int]
    wrapper: str
    allow_downcast: bool
    build: bool
    config: str | None


def _of_component(port: Port, name: str, source: str, settings: _Settings) -> Coverage:
    known = read_target(port, name, source=source, config=settings.config, build=settings.build)
    rules: Any = read_rules(settings.rules) if settings.rules is not None else resolve(port.component(name).rules)
    return coverage(
        rules,
        read_source(source, wrapper=settings.wrapper),
        known.manifest,
        settings.sizes,
        allow_downcast=settings.allow_downcast,
        target_from=known.origin,
        target_config=known.config,
    )
