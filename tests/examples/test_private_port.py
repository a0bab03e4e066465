"""The example of a private port, installed in a fresh environment and from a folder, through ``Omni`` itself."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "worked_ports" / "video"
KIT = ("port_kit", "models", "setup.cfg", "pyproject.toml", "README.md", "LICENSE")


def _copy(target: Path, source: Path, names: tuple[str, ...]) -> Path:
    """Copy the sources, so that building leaves no file in the work tree."""
    for name in names:
        if (source / name).is_dir():
            shutil.copytree(source / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            target.mkdir(exist_ok=True, parents=True)
            shutil.copy(source / name, target / name)
    return target


def _environment(**extra: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PORT_KIT_PATH")}
    return {**kept, "OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1,localhost", **extra}


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter of a fresh environment: the kit and the example are installed, everything else is borrowed."""
    work = tmp_path_factory.mktemp("fresh")
    uv = [sys.executable, "-m", "uv", "--quiet", "--offline"]
    subprocess.run([*uv, "venv", "--python", sys.executable, str(work / "venv")], check=True, timeout=300)
    found = work / "venv" / "bin" / "python"
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(subprocess.check_output([found, "-c", ask], text=True, timeout=300).strip())
    # A path line adds the folder but does not run the .pth files in it: the editable install stays out.
    (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    sources = [_copy(work / "kit", ROOT, KIT), _copy(work / "example", EXAMPLE, ("driftwood", "pyproject.toml"))]
    install = [*uv, "pip", "install", "--python", str(found), "--no-deps", "--no-build-isolation"]
    subprocess.run([*install, *map(str, sources)], check=True, env=_environment(), timeout=300)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a copy of the port under another name, not installed."""
    target = tmp_path_factory.mktemp("folder")
    for path in (file for file in (EXAMPLE / "driftwood").rglob("*.*") if file.suffix in (".py", ".json", ".toml")):
        text = path.read_text(encoding="utf-8").replace("driftwood", "rockpool").replace("Driftwood", "Rockpool")
        copy = target / "rockpool" / path.relative_to(EXAMPLE / "driftwood")
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(text, encoding="utf-8")
    return target


Run = Callable[[str], dict[str, Any]]


@pytest.fixture
def run(python: Path, folder: Path, tmp_path: Path) -> Run:
    """Run the script in the fresh environment beside a broken port, and return its report of a port."""
    (tmp_path / "more" / "wreck").mkdir(parents=True)
    (tmp_path / "more" / "wreck" / "__init__.py").write_text("import sand_castle\nPORT = None\n")

    def start(name: str) -> dict[str, Any]:
        command = [str(python), str(Path(__file__).with_name("run_private.py")), name, str(tmp_path)]
        done = subprocess.run(
            command,
            env=_environment(PORT_KIT_PATH=f"{folder}{os.pathsep}{tmp_path / 'more'}"),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        assert "the port wreck from" in done.stdout + done.stderr, "every process of the engine tells of it"
        report: dict[str, Any] = json.loads((tmp_path / "report.json").read_text())
        assert report["kit"].startswith(str(python.parents[1]))
        assert report["processes"] >= 1
        assert report["shape"] == [3, 24, 40, 3]
        assert report["deviation"] > 1.0
        return report

    return start


@pytest.mark.slow
def test_an_installed_port_runs_in_a_worker_process(run: Run, python: Path) -> None:
    assert run("driftwood")["origin"].startswith(str(python.parents[1]))


@pytest.mark.slow
def test_a_port_in_a_folder_runs_in_a_worker_process_and_computes_the_same(run: Run, folder: Path) -> None:
    """The tests of the engine and of servers run other ports from folders, on two workers, in the default suite."""
    report = run("rockpool")
    assert report["origin"] == str(folder / "rockpool" / "pipeline.py")
    assert report["sum"] == run("driftwood")["sum"]


def test_the_command_line_lists_both(python: Path, folder: Path) -> None:
    command = [str(python.with_name("port-kit")), "list", "--json"]
    done = subprocess.run(
        command, env=_environment(PORT_KIT_PATH=str(folder)), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert {"driftwood", "rockpool", "dreamid_omni"} <= set(json.loads(done.stdout)["data"])
