"""The wheel: its files, and an environment without torch and vLLM before and after its installation."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import zipfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ("port_kit", "models", "setup.cfg", "pyproject.toml", "README.md", "LICENSE")
UV = (sys.executable, "-m", "uv", "--quiet", "--offline")

#: Modules of an interpreter after its start.
STATE = """
import json, sys
print(json.dumps([sorted(sys.modules), sys.path, [str(finder) for finder in sys.meta_path], len(sys.path_hooks)]))
"""


def _requirements(name: str, found: set[str]) -> set[str]:
    """Add a distribution and the distributions that it requires without extras; return the set."""
    try:
        requires = distribution(name).requires or []
    except PackageNotFoundError:
        return found  # for another platform or Python
    found.add(name)
    names = {re.match(r"[\w.-]+", line)[0] for line in requires if "extra ==" not in line}  # type: ignore[index]
    for other in names - found:
        _requirements(other, found)
    return found


def _link_dependencies(site: Path) -> None:
    """Link the distributions that port-kit requires into an environment."""
    for name in _requirements("port-kit", set()) - {"port-kit"}:
        found = distribution(name)
        for top in {path.parts[0] for path in found.files or () if path.parts[0] not in ("..", "__pycache__")}:
            if not (site / top).exists():
                (site / top).symlink_to(Path(str(found.locate_file(top))))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from links to the sources."""
    work = tmp_path_factory.mktemp("wheel")
    source = work / "source"
    source.mkdir()
    for name in SOURCES:
        (source / name).symlink_to(ROOT / name)
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(work)], cwd=source, check=True, capture_output=True, timeout=300)
    (found,) = work.glob("*.whl")
    return found


class Environment:
    """A virtual environment with the dependencies of port-kit, before and after the installation of the wheel."""

    def __init__(self, folder: Path, wheel: Path) -> None:
        subprocess.run([*UV, "venv", "--python", sys.executable, str(folder)], check=True, timeout=300)
        self.folder = folder
        (self.site,) = folder.glob("lib/python*/site-packages")
        _link_dependencies(self.site)
        self.files_before, self.state_before = self.files(), self.state()
        python = str(folder / "bin" / "python")
        subprocess.run([*UV, "pip", "install", "--python", python, "--no-deps", str(wheel)], check=True, timeout=300)

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a program of the environment."""
        program = str(self.folder / "bin" / command[0])
        return subprocess.run(
            [program, *command[1:]], capture_output=True, text=True, cwd=self.folder, timeout=120, check=False
        )

    def files(self) -> set[str]:
        """Return all names of two folders: site-packages and bin."""
        return {path.name for folder in (self.site, self.folder / "bin") for path in folder.iterdir()}

    def state(self) -> object:
        """Return modules, paths and import hooks of a fresh interpreter."""
        return json.loads(self.run("python", "-c", STATE).stdout)


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment with the wheel."""
    return Environment(tmp_path_factory.mktemp("environment") / "venv", wheel)


def test_the_wheel_has_every_source_file(wheel: Path) -> None:
    found = set(zipfile.ZipFile(wheel).namelist())
    for folder, package in (("port_kit", "port_kit"), ("models", "port_kit/models")):
        paths = [path for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts]
        expected = {f"{package}/{path.relative_to(ROOT / folder).as_posix()}" for path in paths}
        assert expected <= found, f"not in the wheel: {sorted(expected - found)}"


def test_the_wheel_has_no_file_outside_its_own_folders(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    dist_info = re.compile(r"port_kit-[^/]+\.dist-info/")
    assert [name for name in names if not name.startswith("port_kit/") and not dist_info.match(name)] == []
    assert [name for name in names if name.endswith((".pth", ".so"))] == []


def test_installation_adds_one_package_and_one_program(environment: Environment) -> None:
    added = environment.files() - environment.files_before
    assert {name for name in added if not name.endswith(".dist-info")} == {"port_kit", "port-kit"}
    assert len(added) == 3


def test_installation_changes_no_start_of_python(environment: Environment) -> None:
    assert environment.state() == environment.state_before


def test_the_kit_and_its_ports_are_imported_from_the_wheel(environment: Environment) -> None:
    code = "import port_kit, port_kit.models as m; print(port_kit.__file__); print(next(iter(m.__path__)))"
    for line in environment.run("python", "-c", code).stdout.split():
        assert Path(line).is_relative_to(environment.site)


def test_commands_run_without_torch_and_vllm(environment: Environment) -> None:
    assert environment.run("python", "-c", "import torch").returncode != 0
    assert "doctor" in environment.run("port-kit", "--help").stdout
    listed = environment.run("port-kit", "list")
    assert listed.returncode == 0 and "dreamid_omni" in listed.stdout, listed.stderr
    report = json.loads(environment.run("port-kit", "doctor", "--json").stdout)
    assert [check["name"] for check in report["data"]["checks"] if not check["ok"]] == ["runtime"]
