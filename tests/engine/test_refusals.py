"""Errors of the kit through ``Omni``: a script shows the message and the hint alone."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from port_kit.errors import InputError, ParallelError
from port_kit.registry import find_port, list_ports
from port_kit.runtime.refusals import refusal_of
from port_kit.scaffold import NewPort, new_port
from port_kit.testing.forkserver import run_forked
from port_kit.testing.tiny_port import download_tiny


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """The example script of a new port, and the options for its tiny model."""
    folder = tmp_path_factory.mktemp("refusals")
    new_port(NewPort("tin_roof", "custom", folder / "port", output="audio"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PORT_KIT_PATH", str(folder / "port"))
        list_ports.cache_clear()
        model = download_tiny(find_port("tin_roof"), folder / "model").directory
    list_ports.cache_clear()
    path = folder / "port" / "generate_tin_roof.py"
    yield [sys.executable, str(path), "--model", str(model), "--tiny", "--dtype", "float32", "--enforce-eager"]


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--ulysses-degree", "3", "error [parallel_degree]: ulysses 3 does not divide the 4 heads per rank"),
        pytest.param(
            *("--audio-length", "99", "[input_value] audio_length is 99 s; at most 30 s are made"),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_the_message_stands_alone(option: str, value: str, message: str, script: list[str], tmp_path: Path) -> None:
    target = tmp_path / "a.wav"
    command = [*script, option, value, "-o", str(target)]
    done = run_forked(command, timeout=400, PORT_KIT_PATH=str(Path(script[1]).parent))
    assert done.returncode == 1
    assert sum(line.startswith(message) for line in done.stderr.splitlines()) == 1, done.stderr
    assert "hint: " in done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert not target.exists()


def test_only_explicit_causes_are_refusals() -> None:
    refusal = ParallelError("tp 3", code="parallel_degree")
    wrapped = RuntimeError("initialization failed")
    wrapped.__cause__ = refusal
    assert refusal_of(wrapped) is refusal_of(refusal) is refusal
    accident = KeyError("x")
    accident.__context__ = InputError("y", code="input_value")
    assert refusal_of(accident) is None
    assert refusal_of(None) is None
