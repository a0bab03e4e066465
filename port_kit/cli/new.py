"""``port-kit new NAME``: a port's folder, recipe, rules, tests, scripts and card."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from port_kit.cli.output import emit, handles_errors, json_option
from port_kit.scaffold.request import PATHS


@click.command(
    "new",
    epilog="Examples:  port-kit new ltx_video --path diffusers --transformer LTXVideoTransformer3DModel  |  "
    "port-kit new my_model --from org/my-model",
)
@click.argument("name")
@click.option("--path", "kind", type=click.Choice(PATHS), help="Where the model's code comes from.  [--from's own]")
@click.option("--from", "source", default="", metavar="REPO_OR_DIR", help="Fill in what inspect finds there.")
@click.option("--transformer", default="", metavar="CLASS", help="The class in diffusers, for --path diffusers.")
@click.option("--endpoint", help="Address of the Hub; default: HF_ENDPOINT, then the public Hub.")
@click.option("--output-dir", type=click.Path(path_type=Path), help="The folder to be made.  [default: ./NAME]")
@json_option
@handles_errors("new")
def command(
    name: str,
    kind: str | None,
    source: str,
    transformer: str,
    endpoint: str | None,
    output_dir: Path | None,
    as_json: bool,
) -> None:
    """Write a port called NAME: a package that passes its own tests at once.

    \b
    diffusers  the transformer is a class of the installed diffusers, sharded
    custom     the model's code is ported into the package
    external   part of the code stays in the model's git repository
    bypass     the pipeline reads its weights itself; they are still accounted for
    hybrid     the decoder is diffusers', the transformer is ported
    """
    from port_kit.scaffold import NewPort, new_port
    from port_kit.scaffold.source import choose_path

    if kind is None and not source and not transformer:
        raise click.UsageError("give --path, --transformer or --from")
    path = choose_path(kind, source, transformer, endpoint)
    port = NewPort(name, path, output_dir or Path(name), transformer, source, endpoint)
    files = [str(file.relative_to(port.target)) for file in new_port(port)]
    data = {"name": name, "path": path, "folder": str(port.target), "files": files}
    text = f"{port.target}: {len(files)} files\nnext: cd {shlex.quote(str(port.target))} && pytest"
    emit("new", data, as_json=as_json, text=text)
