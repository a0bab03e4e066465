"""``port-kit manifest``: names, shapes and dtypes of a checkpoint or of a port's modules."""

from __future__ import annotations

import json
from pathlib import Path

import click

from port_kit.cli.inputs import config_option, read_source, read_target, wrapper_option
from port_kit.cli.output import emit, handles_errors, json_option, write_text
from port_kit.manifest import Manifest
from port_kit.registry import find_port


@click.command(
    "manifest",
    epilog="Examples:  port-kit manifest transformer/ -o transformer.json  |  "
    "port-kit manifest --port dreamid_omni --component vae --json",
)
@click.argument("source", required=False)
@click.option("--port", help="A port's modules instead of a checkpoint.")
@click.option("--component", help="One component of the port.  [default: all]")
@config_option
@wrapper_option
@click.option("--no-cache", "build", is_flag=True, help="Build the port's modules; ignore the manifest cache.")
@click.option("--record", is_flag=True, help="Build, and write the recording in the port's folder.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write the manifest here.")
@json_option
@handles_errors("manifest")
def command(
    source: str | None,
    port: str | None,
    component: str | None,
    config: str | None,
    wrapper: str,
    build: bool,
    record: bool,
    output: Path | None,
    as_json: bool,
) -> None:
    """Read the manifest of SOURCE (a file, folder or Hub repository) or of a port's modules.

    SOURCE may be OWNER/NAME[@REVISION][:PATH]; only headers are read. With --port and --component, the modules have
    the sizes of the configuration beside SOURCE, if it is given.
    """
    if source is None and port is None:
        raise click.UsageError("name a SOURCE or a --port")
    if source is not None and port is not None and component is None:
        raise click.UsageError("with a SOURCE, --port needs a --component; for all, --config MODEL_DIRECTORY")
    if config is not None and (port is None or record):
        raise click.UsageError("--config needs --port, and a recording always has full size")
    if record and port is not None:
        _record(port, component, as_json)
        return
    if port is not None:
        manifest, origin = _of_port(port, component, source, config, build)
    else:
        manifest, origin = read_source(source or "", wrapper=wrapper), "headers"
    if output is not None:
        write_text(output, json.dumps(manifest.to_json(), indent=1) + "\n")
    summary: dict[str, object] = {
        "origin": manifest.origin,
        "from": origin,
        "tensors": len(manifest),
        "bytes": manifest.nbytes,
    }
    text = "\n".join(f"{name}\t{list(spec.shape)}\t{spec.dtype}" for name, spec in manifest.items())
    text += f"\n{len(manifest)} tensors, {manifest.nbytes:,} bytes ({origin})"
    if manifest.naming:
        summary["names"] = manifest.naming
    if manifest.notes:
        summary["notes"] = list(manifest.notes)
    data = summary if output is not None else {**summary, "manifest": manifest.to_json()}
    emit("manifest", data, as_json=as_json, text=f"{output}: {len(manifest)} tensors" if output else text)


def _of_port(
    name: str, component: str | None, source: str | None, config: str | None, build: bool
) -> tuple[Manifest, str]:
    """Return the manifest of a component, or of all with their names in front, and its origin."""
    port = find_port(name)
    if component is not None:
        known = read_target(port, component, source=source, config=config, build=build)
        return known.manifest, f"{known.origin}, {known.config}"
    parts = {part.name: read_target(port, part.name, config=config, build=build) for part in port.components}
    entries = {full: spec for part, known in parts.items() for full, spec in known.manifest.under(f"{part}.").items()}
    origins = dict.fromkeys(f"{known.origin}, {known.config}" for known in parts.values())
    return Manifest(entries, origin=name), "; ".join(origins)


def _record(name: str, component: str | None, as_json: bool) -> None:
    from port_kit.runtime.target_cache import record

    port = find_port(name)
    names = [component] if component else [part.name for part in port.components]
    paths = {part: str(record(port, part)) for part in names}
    emit("manifest", {"recorded": paths}, as_json=as_json, text="\n".join(paths.values()))
