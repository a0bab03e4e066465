"""The start-up hook, on packages that stand in for torch and torchvision builds of every kind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TORCH = """
class version: cuda = {cuda!r}
class library:
    class Library:
        def __init__(self, name, kind): print("library", name, kind)
        def define(self, schema): print("define", schema.partition("(")[0])
"""
FAKES = '@register_fake("torchvision::{}")\n'


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder with a CPU-built torch and a CUDA-built torchvision."""
    for name in ("torch", "torchvision"):
        (tmp_path / name).mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(TORCH.format(cuda=None))
    (tmp_path / "torchvision" / "__init__.py").write_text("import sys\nprint('torchvision', 'torch' in sys.modules)\n")
    (tmp_path / "torchvision" / "version.py").write_text("__version__ = '0.28.0+cu130'\n")
    (tmp_path / "torchvision" / "_meta_registrations.py").write_text(FAKES.format("nms") + FAKES.format("qnms"))
    return tmp_path


def run(site: Path, code: str) -> str:
    """Run code in a fresh interpreter that finds the stand-ins first."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.stdout + done.stderr


def test_it_declares_the_operators_before_torchvision_runs(site: Path) -> None:
    lines = run(site, "import torchvision").splitlines()
    assert lines == ["library torchvision FRAGMENT", "define nms", "define qnms", "torchvision True"]


def test_it_leaves_a_cpu_built_torchvision_alone(site: Path) -> None:
    (site / "torchvision" / "version.py").write_text("__version__ = '0.28.0+cpu'\n")
    assert run(site, "import torchvision").splitlines() == ["torchvision False"]


def test_it_leaves_a_cuda_built_torch_alone(site: Path) -> None:
    (site / "torch" / "__init__.py").write_text(TORCH.format(cuda="13.0"))
    assert run(site, "import torchvision").splitlines() == ["torchvision True"]


def test_looking_for_torchvision_imports_nothing(site: Path) -> None:
    code = (
        "import sys; from importlib.util import find_spec; print(find_spec('torchvision') is not None,"
        " 'torch' in sys.modules, 'torchvision' in sys.modules)"
    )
    assert run(site, code).split() == ["True", "False", "False"]


def test_an_absent_torchvision_stays_absent(site: Path) -> None:
    code = (
        "import sys; from port_kit_startup import TorchvisionFinder as F; sys.path[:] = [];"
        " print(F().find_spec('torchvision'), F().find_spec('json'))"
    )
    assert run(site, code).split() == ["None", "None"]


def test_an_operator_that_is_not_known_is_refused_by_name(site: Path) -> None:
    (site / "torchvision" / "_meta_registrations.py").write_text(FAKES.format("nms") + FAKES.format("deform_conv3d"))
    output = run(site, "import torchvision")
    assert "RegistrationError" in output and "deform_conv3d" in output
    assert "https://download.pytorch.org/whl/cpu" in output
    assert "define" not in output
