"""The parity example: the commands of its page, and a fault that the report names."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.scaffold.helpers import ROOT, environment

PAGE = ROOT / "examples" / "private_port" / "README.md"
MODULES = ["patch", "time", *(f"layers.{index}{part}" for index in (0, 1) for part in (".attn", ".mlp", "")), "final"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The result of the commands of the page."""
    found = tmp_path_factory.mktemp("parity")
    (found / "examples").symlink_to(ROOT / "examples")
    (block,) = re.findall(r"^```bash\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    done = subprocess.run(
        ["bash", "-ec", block], cwd=found, env=environment(), capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 of 1 cases within their bounds" in done.stdout
    return found


def verify(folder: Path) -> dict[str, Any]:
    """Compare the port with the goldens; return the report of the case."""
    done = subprocess.run(
        ["port-kit", "verify", "parity", "tidepool", "--goldens", "GOLDENS", "--json"],
        cwd=folder,
        env=environment(PORT_KIT_PATH=str(ROOT / "examples" / "private_port")),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    (case,) = json.loads(done.stdout)["data"]["cases"]
    return case


def test_a_changed_weight_is_found_in_its_block(folder: Path) -> None:
    assert (folder / "parity.html").is_file()
    path = folder / "MODEL" / "transformer" / "model.safetensors"
    tensors = load_file(path)
    tensors["layers.1.attn.v.weight"] = torch.roll(tensors["layers.1.attn.v.weight"], 1, 0)
    save_file(tensors, path)
    case = verify(folder)
    assert case["first_divergence"] == "layers.1.attn"
    assert [item["name"] for item in case["differences"]] == [*MODULES, "velocity"]
