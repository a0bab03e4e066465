"""What ``port-kit new`` writes passes its own tests, lint and form at once, without an edit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from port_kit.scaffold import NewPort, new_port
from tests.scaffold.conftest import run_pytest

OWN = ("custom", "external", "bypass", "hybrid")


@pytest.fixture(scope="module")
def ports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A port of every path, and one with the longest name."""
    folder = tmp_path_factory.mktemp("ports")
    for path in OWN:
        new_port(NewPort(f"{path}_one", path, folder / f"{path}_one"))  # type: ignore[arg-type]
    new_port(NewPort("ltx", "diffusers", folder / "ltx", "LTXVideoTransformer3DModel"))
    new_port(NewPort("a" * 30, "external", folder / "longest"))
    return folder


def test_what_is_written_is_linted_and_formatted(ports: Path) -> None:
    for arguments in (["check", "--no-cache"], ["format", "--diff", "--no-cache"]):
        command = [sys.executable, "-m", "ruff", *arguments, str(ports)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr


def test_every_path_passes_its_own_tests(ports: Path) -> None:
    """Ranks against one rank here for diffusers' class alone: the other four share one transformer."""
    tests = [f"{path}_one/tests" for path in OWN]
    out = run_pytest(tests + ["ltx/tests"], "-m", "not engine", "-k", "not ranks_share or ltx", cwd=ports)
    assert "18 passed" in out


@pytest.mark.slow
@pytest.mark.parametrize("path", OWN)
def test_ranks_share_the_work(ports: Path, path: str) -> None:
    assert "1 passed" in run_pytest([f"{path}_one/tests/test_parallel.py"], cwd=ports)


def test_the_engine_runs_a_skeleton(ports: Path) -> None:
    assert "1 passed" in run_pytest(["external_one/tests/test_generate.py"], cwd=ports)


@pytest.mark.slow
@pytest.mark.parametrize("path", ["custom", "bypass", "hybrid"])
def test_the_engine_runs_the_other_skeletons(ports: Path, path: str) -> None:
    assert "1 passed" in run_pytest([f"{path}_one/tests/test_generate.py"], cwd=ports)


@pytest.mark.slow
def test_pictures_are_made_as_well(tmp_path: Path) -> None:
    new_port(NewPort("pix", "diffusers", tmp_path / "pix", "PixArtTransformer2DModel"))
    assert "6 passed" in run_pytest(["pix/tests"], cwd=tmp_path)
