"""The tiny LTX-Video, and the processes of the scaffold tests."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from port_kit.autoparallel.tiny_pipelines import CASES, write_pipeline
from port_kit.testing.forkserver import run_forked

ROOT = Path(__file__).parents[2]
REPOSITORY = "Lightricks/LTX-Video"
LTX = CASES["LTXPipeline"]


def environment(**more: str) -> dict[str, str]:
    """The variables of a process that a test starts."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    quiet = {"NO_PROXY": "127.0.0.1,localhost", "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"}
    inherited = {name: value for name, value in os.environ.items() if name != "PORT_KIT_PATH"}
    return {**inherited, **quiet, "PATH": path, **more}


def write_ltx(folder: Path) -> dict[str, Path]:
    """Write a tiny LTX-Video in the layout of its repository."""
    write_pipeline("LTXPipeline", LTX, folder)
    (folder / "README.md").write_text("---\nlicense: other\nlicense_name: tiny-licence\n---\n")
    return {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}


def run_pytest(folders: list[str], *options: str, cwd: Path) -> str:
    """Run the tests of generated ports in one process; return its output."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--import-mode=importlib",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
    ]
    # one root above all of them: fixtures of the same name differ by their path below it
    markers = ("--rootdir", str(cwd), "-o", "markers=engine: starts an engine")
    done = run_forked([*command, *markers, *options, *folders], cwd=cwd, timeout=900, PATH=environment()["PATH"])
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    return done.stdout
