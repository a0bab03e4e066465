"""``port-kit convert SRC DST``: a pickle checkpoint becomes a safetensors file."""

from __future__ import annotations

from pathlib import Path

import click

from port_kit.checkpoint.convert import convert_file
from port_kit.cli.output import emit, handles_errors, json_option
from port_kit.download.progress import choose_progress, human


@click.command(
    "convert",
    epilog="Examples:  port-kit convert vae.pth vae/model.safetensors  |  "
    "port-kit convert best_netG.pt vocoder/model.safetensors --wrapper generator",
)
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("target", type=click.Path(path_type=Path))
@click.option("--wrapper", default="", metavar="KEYS", help="Keys above the tensors, dotted (generator, app.model).")
@click.option("--drop", multiple=True, metavar="NAME", help="Leave a value out on purpose (epoch).")
@click.option("-q", "--quiet", is_flag=True, help="Errors only.")
@json_option
@handles_errors("convert")
def command(source: Path, target: Path, wrapper: str, drop: tuple[str, ...], quiet: bool, as_json: bool) -> None:
    """Convert the checkpoint SOURCE (.pth, .pt, .bin) to the safetensors file TARGET.

    Names do not change. The pickle is not executed, and memory does not grow with the size of the checkpoint.
    """
    progress = choose_progress(quiet=quiet or as_json)
    progress.begin(f"converting {source.name}", source.stat().st_size if source.is_file() else 0)
    try:
        done = convert_file(source, target, wrapper=wrapper, drop=drop, advance=progress.advance)
    finally:
        progress.end()
    data = {"source": str(source), "target": str(target), "tensors": done.tensors, "size": done.size}
    verb = "is up to date" if done.unchanged else "written"
    text = f"{target} {verb}: {done.tensors} tensors, {human(done.size)}"
    emit("convert", {**data, "unchanged": done.unchanged}, as_json=as_json, text=None if quiet else text)
