"""``port-kit hub FOLDER``: serve a folder as a Hub on the loopback interface."""

from __future__ import annotations

import re
import signal
import threading
from pathlib import Path

import click

from port_kit.cli.output import emit, handles_errors, json_option
from port_kit.download.progress import human
from port_kit.errors import DownloadError
from port_kit.testing.hub import Hub
from port_kit.testing.hub_tree import read_repositories

_REPOSITORY = r"[\w.-]+/[\w.-]+"


@click.command(
    "hub",
    epilog="Examples:  port-kit hub REPOSITORIES  |  port-kit hub checkpoint --repository org/model --port 8100",
)
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--repository", metavar="ORG/NAME", help="FOLDER itself is this repository.")
@click.option("--port", default=0, show_default="a free one", type=click.IntRange(0, 65535), help="TCP port.")
@json_option
@handles_errors("hub")
def command(folder: Path, repository: str | None, port: int, as_json: bool) -> None:
    """Serve FOLDER as a Hub on the loopback interface, until Ctrl-C.

    FOLDER has one repository per subfolder ORG/NAME. Commands that run with the printed HF_ENDPOINT, such as
    port-kit inspect and download, read it as the Hub. Files are hashed once, at the start; hidden ones are left out.
    """
    if repository is not None and re.fullmatch(_REPOSITORY, repository) is None:
        raise click.UsageError(f"--repository {repository}: expected ORG/NAME")
    repositories = read_repositories(folder, repository)
    size = sum(path.stat().st_size for files in repositories.values() for path in files.values())
    click.echo(f"hashing {human(size)}", err=True)
    stopped = threading.Event()
    for sign in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sign, lambda *_: stopped.set())
    try:
        hub = Hub(repositories, port=port)
    except OSError as error:
        raise DownloadError(
            f"port {port} cannot be opened: {error.strerror}", code="hub_folder", hint="leave out --port for a free one"
        ) from error
    with hub:
        commits = {repo_id: hub.commit(repo_id) for repo_id in repositories}
        lines = [f"{repo_id}  {commit}  {len(repositories[repo_id])} files" for repo_id, commit in commits.items()]
        data = {"endpoint": hub.endpoint, "repositories": commits}
        emit("hub", data, as_json=as_json, text="\n".join([*lines, f"export HF_ENDPOINT={hub.endpoint}"]))
        click.echo("Ctrl-C ends it", err=True)
        stopped.wait()
    click.echo(f"stopped after {len(hub.requests)} requests", err=True)
