"""What the tests of the worked ports share: their folders, their own tests, and the Hub of their models."""

from __future__ import annotations

import sys
from pathlib import Path

from port_kit.testing.forkserver import run_forked
from tests.scaffold.helpers import ROOT, environment

PORTS = ROOT / "examples" / "worked_ports"


def run_own_tests(kind: str, *options: str, folder: Path) -> str:
    """Run a port's own tests as its user would, in its folder; return pytest's output."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command += [f"--basetemp={folder / 'own'}", *options]
    done = run_forked(command, cwd=PORTS / kind, timeout=1500, PATH=environment()["PATH"])
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    return done.stdout
