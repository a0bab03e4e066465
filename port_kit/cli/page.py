"""``port-kit page PORT``: a web page for a port, over a server of it."""

from __future__ import annotations

import click

from port_kit.cli.output import handles_errors
from port_kit.cli.serve import check_free
from port_kit.registry import find_port


@click.command(
    "page",
    context_settings={"ignore_unknown_options": True},
    epilog="Examples:  port-kit page ovi --url http://127.0.0.1:8000  |  "
    "port-kit page ovi --model DIR --tensor-parallel-size 2",
)
@click.argument("name", metavar="PORT")
@click.option("--url", default="http://127.0.0.1:8000", show_default=True, help="A running server.")
@click.option("--api-key", default="", envvar="API_KEY", help="Key of the server; default: the variable API_KEY.")
@click.option(
    "--model",
    type=click.Path(exists=True, file_okay=False),
    help="Serve this model directory instead.",
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address of the page.")
@click.option("--port", default=7860, show_default=True, type=click.IntRange(1, 65535), help="TCP port of the page.")
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
@handles_errors("page")
def command(
    name: str, url: str, api_key: str, model: str | None, host: str, port: int, options: tuple[str, ...]
) -> None:
    """Open a web page for PORT: its request, progress, and the clips.

    It needs a server of the port: a running one, or with --model one of its own, to which OPTIONS are passed on.
    Everybody who reaches the page may use the server through it.
    """
    from port_kit.page.run_page import run_page

    check_free(host, port)
    run_page(
        find_port(name),
        url=url,
        key=api_key,
        model=model,
        options=options,
        host=host,
        tcp_port=port,
        tell=lambda line: click.echo(line, err=True),
    )
