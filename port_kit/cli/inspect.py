"""``port-kit inspect REPO_OR_DIR``: classify a model and show the next step."""

from __future__ import annotations

import click

from port_kit.cli.output import emit, handles_errors, json_option


@click.command(
    "inspect",
    epilog="Examples:  port-kit inspect Wan-AI/Wan2.2-TI2V-5B  |  port-kit inspect ./my_model --json",
)
@click.argument("target", metavar="REPO_OR_DIR")
@click.option("--revision", help="Branch, tag or commit of a repository; default: main.")
@click.option("--endpoint", help="Address of the Hub; default: HF_ENDPOINT, then the public Hub.")
@json_option
@handles_errors("inspect")
def command(target: str, revision: str | None, endpoint: str | None, as_json: bool) -> None:
    """Classify a model as supported, diffusers-based, hybrid or custom, with the reasons.

    Reads the listing, the small texts and the headers of the weights; downloads no weights and executes no code.
    Exit code 1 if the files that identify the model cannot be read.
    """
    from port_kit.inspect import describe, inspect

    inspection = inspect(target, revision=revision, endpoint=endpoint)
    emit(
        "inspect",
        inspection.to_dict(),
        as_json=as_json,
        text=describe(inspection),
        ok=inspection.path != "unknown",
    )
