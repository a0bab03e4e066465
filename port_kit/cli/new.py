"""``port-kit new NAME``: a port's folder, recipe, rules, tests, scripts and card."""

from __future__ import annotations

import shlex
from functools import partial
from pathlib import Path

import click

from port_kit.cli.output import emit, handles_errors, json_option
from port_kit.scaffold.modality import MODALITIES, Modality
from port_kit.scaffold.request import PATHS


@click.command(
    "new",
    epilog="Examples:  port-kit new ltx_video --from Lightricks/LTX-Video  |  "
    "port-kit new my_model --path custom --output audio  |  "
    "port-kit new my_model --code https://github.com/org/model --from org/my-model",
)
@click.argument("name")
@click.option("--path", "kind", type=click.Choice(PATHS), help="Where the model's code comes from.  [--from's own]")
@click.option(
    "--from", "sources", multiple=True, metavar="REPO_OR_DIR", help="Fill in what inspect finds there; repeatable."
)
@click.option(
    "--repository",
    "repositories",
    multiple=True,
    metavar="OWNER/NAME",
    help="Repository with the files of a folder of --from; one per folder.",
)
@click.option(
    "--wrapper", default="", metavar="KEYS", help="Tensors to take from a pickle with several sets of them (ema)."
)
@click.option("--output", type=click.Choice(MODALITIES), help="What the model generates.  [video]")
@click.option("--code", default="", metavar="GIT_URL", help="The model's code.  [--from's own]")
@click.option("--endpoint", help="Address of the Hub; default: HF_ENDPOINT, then the public Hub.")
@click.option("--output-dir", type=click.Path(path_type=Path), help="The folder to be made.  [default: ./NAME]")
@json_option
@handles_errors("new")
def command(
    name: str,
    kind: str | None,
    sources: tuple[str, ...],
    repositories: tuple[str, ...],
    wrapper: str,
    output: Modality | None,
    code: str,
    endpoint: str | None,
    output_dir: Path | None,
    as_json: bool,
) -> None:
    """Write a port called NAME: a package that passes its own tests at once.

    \b
    diffusers  the pipeline of diffusers runs unchanged, split by a plan
    custom     the model's code is ported into the package
    external   the model's code stays in its git repository, split by a plan
    bypass     the pipeline reads its weights itself; they are still accounted for
    hybrid     the decoder is diffusers', the transformer is ported
    """
    from port_kit.scaffold import NewPort, new_port
    from port_kit.scaffold.source import choose_path

    if kind is None and not sources and not code:
        raise click.UsageError("give --path, --code or --from")
    source, *more = sources or ("",)
    path = choose_path(kind, source, code, endpoint)
    if code and path != "external" and not (sources and path in ("custom", "bypass", "hybrid")):
        raise click.UsageError(f"--code is for --path external and for --from, not for --path {path}")
    if more and path == "diffusers":
        raise click.UsageError("a pipeline of diffusers lies in one repository: give --from once")
    if output and path == "diffusers":
        raise click.UsageError("--output is for models of own code; a pipeline of diffusers has an output of its own")
    target = output_dir or Path(name)
    port = NewPort(name, path, target, source, code, endpoint, output or "video", tuple(more), repositories, wrapper)
    files = [str(file.relative_to(port.target)) for file in new_port(port, partial(click.echo, err=True))]
    data = {"name": name, "path": path, "folder": str(port.target), "files": files}
    text = f"{port.target}: {len(files)} files\nnext: cd {shlex.quote(str(port.target))} && pytest"
    emit("new", data, as_json=as_json, text=text)
