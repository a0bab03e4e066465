"""``port-kit serve MODEL``: vLLM-Omni's server behind the kit's gateway."""

from __future__ import annotations

import importlib.util
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from port_kit.cli.output import handles_errors
from port_kit.errors import ConfigError, OptionalDependencyError, PortNotFoundError
from port_kit.pipeline.model_index import ModelIndex
from port_kit.registry import port_of_class
from port_kit.serving import GATEWAY, SERVER
from port_kit.serving.deploy import engine_options
from port_kit.serving.limits import Limits, option

#: Folder of finished videos in the current directory; the server makes it.
STORAGE = "port_kit_videos"

#: Limits that are one number, with their help.
_NUMBERS = {
    "keep_seconds": "Time that finished videos are kept.",
    "max_upload_mb": "Size of a request's body, in MB.",
    "upload_seconds": "Time in which a body must arrive.",
    "idle_seconds": "Time in which a client must take each part of an answer.",
    "max_queue": "Requests that wait or run.",
    "fetch_seconds": "Time to fetch the references of a request.",
    "drain_seconds": "Time that running requests get after SIGTERM.",
}


def _number_options(function: Callable[..., Any]) -> Callable[..., Any]:
    defaults = Limits()
    for name, text in reversed(_NUMBERS.items()):
        default = getattr(defaults, name)
        decorate = click.option(option(name), name, default=default, type=type(default), show_default=True, help=text)
        function = decorate(function)
    return function


@click.command(
    "serve",
    context_settings={"ignore_unknown_options": True},
    epilog="Examples:  port-kit serve DIR --port 8091 --max-queue 16  |  "
    "port-kit serve DIR --api-key KEY --lora-root loras --tensor-parallel-size 2",
)
@click.argument("model", type=click.Path(exists=True, file_okay=False))
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=8000, show_default=True, type=click.IntRange(1, 65535), help="TCP port to listen on.")
@click.option("--api-key", "keys", multiple=True, help="Key of a client; repeat it. Processes can see it.")
@click.option("--storage", default=STORAGE, show_default=True, help="Folder of finished videos.")
@click.option("--lora-root", "lora_roots", multiple=True, help="Folder of LoRA files that requests may name.")
@click.option(
    "--reference-host", "reference_hosts", multiple=True, help="HOST or HOST:PORT that references may be fetched from."
)
@click.option(
    "--deploy-config",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Deploy file of vLLM-Omni (YAML). Options of the command line override it.",
)
@_number_options
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
@handles_errors("serve")
def command(
    model: str,
    host: str,
    port: int,
    keys: tuple[str, ...],
    storage: str,
    options: tuple[str, ...],
    lora_roots: tuple[str, ...],
    deploy_config: Path | None,
    **limits: Any,
) -> None:
    """Serve the model directory MODEL to several clients, with limits on what they may ask for.

    OPTIONS are passed on to 'vllm serve': --dtype, --tensor-parallel-size, --ulysses-degree, ...

    Clients are known by their API keys. Without keys, everybody who reaches the server may use it.
    """
    for name in ("vllm", "vllm_omni"):
        if importlib.util.find_spec(name) is None:
            raise OptionalDependencyError(
                f"serving needs {name}, which is not installed", hint="pip install 'port-kit[omni]'"
            )
    variables = Limits(lora_roots=tuple(_folder(root) for root in lora_roots), **limits).to_environment()
    deployed = _deployed(ModelIndex.read(model).text("_class_name"), deploy_config)
    check_free(host, port)
    folder = Path(storage).resolve()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    environment = {**os.environ, **variables}
    # glibc keeps freed memory per thread; with its default of arenas, a server that is attacked grows by a tenth
    environment.setdefault("MALLOC_ARENA_MAX", "2")
    environment["VLLM_OMNI_SERVER_STORAGE__PATH"] = str(folder)
    # with this variable, vLLM-Omni's own storage would delete files that it did not write
    environment.pop("VLLM_OMNI_SERVER_STORAGE__FILE_TTL", None)
    line = ["-m", SERVER, "serve", model, "--omni", "--middleware", GATEWAY]
    line += ["--host", host, "--port", str(port), *(("--api-key", *keys) if keys else ())]
    line += [*deployed, *options]
    click.echo(f"Loading {model}. The server answers at http://{host}:{port} once it is loaded.", err=True)
    os.execve(sys.executable, [sys.executable, *line], environment)


def _deployed(class_name: str, deploy_config: Path | None) -> list[str]:
    """Return the options of a deploy file; vLLM-Omni reads that of a pipeline of its own registry itself."""
    if deploy_config is None:
        return []
    try:
        port_of_class(class_name)
    except PortNotFoundError:
        return ["--deploy-config", str(deploy_config)]
    return engine_options(deploy_config)


def _folder(root: str) -> str:
    path = Path(root).resolve()
    if not path.is_dir():
        raise ConfigError(f"--lora-root {root} is no folder", code="config_invalid", hint="give a folder of LoRA files")
    return str(path)


def check_free(host: str, port: int) -> None:
    """Refuse a TCP port that is in use, before a model is loaded.

    Raises:
        ConfigError: ``config_invalid``.
    """
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"{host}:{port} cannot be used: {error.strerror}",
                code="config_invalid",
                hint="choose another one with --port",
            ) from error
