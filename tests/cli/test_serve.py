"""``port-kit serve``: what it refuses before a model is loaded. The servers themselves are in ``tests/serving``."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from click.testing import CliRunner

from port_kit.cli import main
from port_kit.errors import ConfigError
from port_kit.serving.limits import Limits
from port_kit.testing.server import free_port


def refused(folder: Path, *options: str, index: str = '{"_class_name": "OviPipeline"}') -> str:
    if folder.is_dir():
        (folder / "model_index.json").write_text(index)
    done = CliRunner().invoke(main, ["serve", str(folder), "--storage", str(folder / "videos"), *options])
    assert done.exit_code != 0
    assert not (folder / "videos").exists()
    return done.output


def test_a_used_port_is_refused(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        assert f"127.0.0.1:{port} cannot be used: Address already in use" in refused(tmp_path, "--port", port)


def test_folders_must_exist(tmp_path: Path) -> None:
    assert "is no folder" in refused(tmp_path, "--port", str(free_port()), "--lora-root", str(tmp_path / "none"))
    assert "does not exist" in refused(tmp_path / "none")


@pytest.mark.parametrize(("index", "problem"), [('{"_class_name": "Ovi', "cannot read"), ("{}", "lacks _class_name")])
def test_a_damaged_index_is_named(tmp_path: Path, index: str, problem: str) -> None:
    output = refused(tmp_path, "--port", str(free_port()), index=index)
    assert all(part in output for part in ("model_incomplete", str(tmp_path / "model_index.json"), problem))


@pytest.mark.parametrize("option", ["--max-queue", "--max-upload-mb", "--drain-seconds"])
def test_limits_are_positive(tmp_path: Path, option: str) -> None:
    output = refused(tmp_path, "--port", str(free_port()), option, "0")
    assert f"{option} is 0" in output and "more than 0 is required" in output


def test_limits_survive_the_environment() -> None:
    limits = Limits(max_queue=7, reference_hosts=("a.example", "b.example:8080"), lora_roots=("/a b", "/c,d"))
    assert Limits.from_environment(limits.to_environment()) == limits
    assert Limits.from_environment({}) == Limits()
    with pytest.raises(ConfigError, match="--max-queue"):
        Limits.from_environment({"PORT_KIT_SERVE_MAX_QUEUE": "many"})
