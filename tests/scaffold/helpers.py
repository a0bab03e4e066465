"""The tiny LTX-Video, and the processes of the scaffold tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from port_kit.inspect.adapted_classes import FAMILIES
from port_kit.scaffold.diffusers_class import build_parts

ROOT = Path(__file__).parents[2]
LTX = FAMILIES["LTXVideoTransformer3DModel"]


def environment(**more: str) -> dict[str, str]:
    """The variables of a process that a test starts."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    quiet = {"NO_PROXY": "127.0.0.1,localhost", "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"}
    inherited = {name: value for name, value in os.environ.items() if name != "PORT_KIT_PATH"}
    return {**inherited, **quiet, "PATH": path, **more}


def write_ltx(folder: Path) -> dict[str, Path]:
    """Write a tiny LTX-Video in the layout of its repository, with whatever values its classes begin with."""
    import diffusers
    import torch

    torch.manual_seed(0)
    (folder / "tokenizer").mkdir(parents=True)
    parts = build_parts(LTX, folder / "tokenizer")
    parts["transformer"] = diffusers.LTXVideoTransformer3DModel(**LTX.tiny)
    for name, part in parts.items():
        if name != "tokenizer":
            part.save_pretrained(folder / name)
    index = {name: [type(part).__module__.partition(".")[0], type(part).__name__] for name, part in parts.items()}
    index["_class_name"], index["_diffusers_version"] = LTX.pipeline, diffusers.__version__
    (folder / "model_index.json").write_text(json.dumps(index))
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
    done = subprocess.run(
        [*command, *markers, *options, *folders],
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    return done.stdout
