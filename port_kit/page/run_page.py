"""Start of a page, and of a server for it."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from port_kit.errors import ConfigError, InputError
from port_kit.escape import escape_control_chars
from port_kit.page import check_page
from port_kit.page.client import JobClient
from port_kit.port import Port
from port_kit.testing.server import ApiServer

#: Seconds in which a server must have loaded its model.
LOAD_SECONDS = 3600.0
#: Largest upload, as in a server without options.
MAX_UPLOAD = "64mb"


def run_page(
    port: Port,
    *,
    url: str,
    key: str,
    model: str | None,
    options: Sequence[str],
    host: str,
    tcp_port: int,
    tell: Callable[[str], None],
) -> None:
    """Serve the page until a signal ends it.

    Args:
        port: the port.
        url: of the server, unless ``model`` is given.
        key: API key of the server; empty for none.
        model: model directory of a server that is started and ended with the page.
        options: of ``port-kit serve``, for that server.
        host, tcp_port: address of the page.
        tell: receives lines on what happens.

    Raises:
        OptionalDependencyError: gradio is not installed.
        InputError: the port makes no videos, or there are options without a model.
        ConfigError: the server or the page does not start.
    """
    check_page(port)
    if options and model is None:
        raise InputError(
            f"{' '.join(options)}: options of a server without --model",
            hint="give --model, or the options to port-kit serve",
        )
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C, also while the server loads
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="port_kit_page_")))
        server = None
        if model is not None:
            tell(f"Loading {model}; the log of its server is {folder / 'server.log'}")
            server = stack.enter_context(_server(model, options, key, folder))
        client = JobClient(url if server is None else server.url, key)
        stack.callback(_launch(port, client, folder, host, tcp_port))
        tell(f"The page of {port.name} is at http://{host}:{tcp_port}, its server at {client.url}. Ctrl-C ends it.")
        _wait(server)


@contextmanager
def _server(model: str, options: Sequence[str], key: str, folder: Path) -> Iterator[ApiServer]:
    """Start a server, wait until it is ready, and end it."""
    environment = {"VLLM_API_KEY": key} if key else {}
    server = ApiServer(
        model,
        *options,
        folder=folder,
        environment=environment,
        directory=Path.cwd(),
        start_timeout=LOAD_SECONDS,
    )
    try:
        server.__enter__()
    except RuntimeError as error:
        raise _ended(escape_control_chars(error.args[0], keep="\n")) from error
    try:
        yield server
    finally:
        server.stop()


def _wait(server: ApiServer | None) -> None:
    """Wait for Ctrl-C.

    Raises:
        ConfigError: the server has ended.
    """
    with suppress(KeyboardInterrupt):
        while server is None or server.is_alive():
            time.sleep(1.0)
        raise _ended(f"the server ended with exit code {server.exit_code}:\n{server.tail()}")


def _ended(message: str) -> ConfigError:
    return ConfigError(message, code="page_server", hint="correct what the end of its log says, or try port-kit serve")


def _launch(port: Port, client: JobClient, folder: Path, host: str, tcp_port: int) -> Callable[[], None]:
    """Start the page and return what ends it."""
    # gradio reads both when it is imported; it would report each start to its makers, and keep clips in /tmp
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_TEMP_DIR"] = str(folder / "gradio")
    import gradio as gr

    from port_kit.page.build import Page
    from port_kit.page.style import CSS, FONTS, MONO_FONTS

    blocks = Page(port, client, folder).build()
    blocks.launch(
        server_name=host,
        server_port=tcp_port,
        prevent_thread_lock=True,
        quiet=True,
        max_file_size=MAX_UPLOAD,
        footer_links=[],
        theme=gr.themes.Soft(primary_hue="indigo", font=FONTS, font_mono=MONO_FONTS),
        css=CSS,
    )
    return blocks.close
