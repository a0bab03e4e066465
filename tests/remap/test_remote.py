"""Manifests of a repository from headers alone: one file, an index in a subfolder, a pickle."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from port_kit.testing.hub import Hub

BIG = (512, 2048)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("repo")
    parts = {"model-1.safetensors": ["a", "b"], "model-2.safetensors": ["c"]}
    for file, names in parts.items():
        save_file({name: torch.zeros(BIG, dtype=torch.bfloat16) for name in names}, folder / file)
    index = {"weight_map": {name: file for file, names in parts.items() for name in names}}
    torch.save({"generator": {"x.weight": torch.zeros(BIG), "x.bias": torch.zeros(3)}}, folder / "net.pt")
    content = {f"dit/{file}": (folder / file).read_bytes() for file in parts}
    content["dit/model.safetensors.index.json"] = json.dumps(index).encode()
    content["single/one.safetensors"] = content["dit/model-2.safetensors"]
    content["ext/net.pt"] = (folder / "net.pt").read_bytes()
    content["README.md"] = b"# none"
    return content


def manifest(hub: Hub, source: str, home: Path, *more: str) -> tuple[int, dict]:
    done = subprocess.run(
        [sys.executable, "-m", "port_kit", "manifest", source, "--json", *more],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **hub.environment, "HF_HOME": str(home)},
    )
    assert done.stdout, done.stderr[-2000:]
    return done.returncode, json.loads(done.stdout)


@pytest.mark.parametrize(
    ("path", "more", "names"),
    [
        (":dit", (), {"a", "b", "c"}),
        ("@main:dit/model.safetensors.index.json", (), {"a", "b", "c"}),
        (":single/one.safetensors", (), {"c"}),
        (":ext/net.pt", ("--wrapper", "generator"), {"x.weight", "x.bias"}),
    ],
)
def test_headers_of_a_repository(files: dict, tmp_path: Path, path: str, more: tuple, names: set) -> None:
    with Hub({"owner/model": files}) as hub:
        code, envelope = manifest(hub, f"owner/model{path}", tmp_path, *more)
        assert code == 0, envelope
        assert set(envelope["data"]["manifest"]) == names
        big = next(entry for entry in envelope["data"]["manifest"].values() if entry[0] == list(BIG))
        assert big[1] in ("bfloat16", "float32")


def test_what_cannot_be_read_says_why(files: dict, tmp_path: Path) -> None:
    with Hub({"owner/model": files}) as hub:
        for path in ("", ":README.md", ":nothing.safetensors"):
            code, envelope = manifest(hub, f"owner/model{path}", tmp_path)
            assert code == 1 and envelope["error"]["code"] == "manifest_invalid" and envelope["error"]["hint"]
        code, envelope = manifest(hub, "owner/other:x.safetensors", tmp_path)
        assert code == 1 and envelope["error"]["code"] == "manifest_invalid"
