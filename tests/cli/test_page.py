"""``port-kit page`` without gradio: what is refused before a page starts."""

from __future__ import annotations

import socket

import pytest
from click.testing import CliRunner, Result

from port_kit.cli import main
from port_kit.testing.server import free_port


def run(*options: str) -> Result:
    """Run the command for the page of Ovi."""
    return CliRunner().invoke(main, ["page", "ovi", *options])


def test_a_missing_gradio_is_an_error_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    done = run("--port", str(free_port()))
    assert done.exit_code == 1
    assert "[dependency_missing]" in done.output and "pip install 'port-kit[page]'" in done.output


def test_options_of_a_server_need_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    done = run("--port", str(free_port()), "--tensor-parallel-size", "2")
    assert done.exit_code == 1 and "--tensor-parallel-size 2: options of a server without --model" in done.output


def test_an_address_in_use_is_refused() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = run("--port", str(taken.getsockname()[1]))
    assert done.exit_code == 1 and "[config_invalid]" in done.output
