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


def kit(hub: Hub, home: Path, *words: str) -> tuple[int, dict]:
    """Run a command in a process of its own, which talks to the loopback Hub: exit code and envelope."""
    done = subprocess.run(
        [sys.executable, "-m", "port_kit", *words, "--json"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **hub.environment, "HF_HOME": str(home)},
        timeout=300,
    )
    assert done.stdout, done.stderr[-2000:]
    envelope = json.loads(done.stdout)
    assert envelope["schema"] == "port-kit/1" and envelope["ok"] is (done.returncode == 0)
    return done.returncode, envelope


def manifest(hub: Hub, source: str, home: Path, *more: str) -> tuple[int, dict]:
    return kit(hub, home, "manifest", source, *more)


RULES = """name = "remote"
[[rule]]
source = '([abc])|x\\.(weight)|(x\\.bias)'
target = 'm.\\1\\2\\3'
"""


@pytest.mark.parametrize(
    ("path", "more", "names"),
    [
        (":dit", (), ("a", "b", "c")),
        (":single/one.safetensors", (), ("c",)),
        (":ext/net.pt", ("--wrapper", "generator"), ("weight", "x.bias")),
    ],
)
def test_rules_meet_a_remote_checkpoint_before_it_is_downloaded(
    files: dict, tmp_path: Path, path: str, more: tuple, names: tuple
) -> None:
    """Coverage, plan and proposal from headers alone; the bytes that the Hub sent are a small part of the file."""
    rules, target, found = tmp_path / "r.toml", tmp_path / "T.json", f"owner/model{path}"
    rules.write_text(RULES)
    target.write_text(json.dumps({f"m.{name}": [[3] if "bias" in name else BIG, "float32"] for name in names}))
    sides = ("--source", found, "--target", str(target))
    with Hub({"owner/model": files}) as hub:
        code, envelope = kit(hub, tmp_path, "coverage", *sides, "--rules", str(rules), *more)
        assert code == 0 and envelope["data"]["source"]["used"] == len(names), envelope
        assert sum(request.sent for request in hub.requests) < 1 << 20 < sum(map(len, files.values()))
        if not more:  # rules commands read no wrapped pickles
            code, envelope = kit(hub, tmp_path, "rules", "plan", *sides, "--rules", str(rules))
            assert code == 0 and {entry["op"] for entry in envelope["data"]["map"].values()} == {"copy"}
            code, envelope = kit(hub, tmp_path, "rules", "suggest", *sides)
            assert code == 0 and set(envelope["data"]["missing"]) <= {f"m.{name}" for name in names}
        target.write_text(json.dumps({"m.a": [7]}))
        code, envelope = kit(hub, tmp_path, "coverage", *sides, "--rules", str(rules), *more)
        assert code == 1 and envelope["data"]["problem_count"] > 0
        files_named = [problem.get("file") for problem in envelope["data"]["problems"] if problem.get("source")]
        assert files_named and all(files_named)


def test_a_gated_repository_says_what_to_do(files: dict, tmp_path: Path) -> None:
    target = tmp_path / "T.json"
    target.write_text("{}")
    with Hub({"owner/model": files}, gated=("owner/model",)) as hub:
        sides = ("--source", "owner/model:single/one.safetensors", "--target", str(target))
        code, envelope = kit(hub, tmp_path, "rules", "suggest", *sides)
        assert code == 1 and envelope["error"]["code"] == "manifest_invalid"
        assert "token" in envelope["error"]["hint"]


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


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_a_remote_index_decides_and_its_files_must_be_there(tmp_path: Path, suffix: str) -> None:
    def content(**tensors: int) -> bytes:
        path = tmp_path / f"part.{suffix}"
        values = {name: torch.zeros(length) for name, length in tensors.items()}
        if suffix == "bin":
            torch.save(values, path)
        else:
            save_file(values, path, metadata={"port_kit.names": "converted"})
        return path.read_bytes()

    one, two = f"one.{suffix}", f"two.{suffix}"
    index = json.dumps({"weight_map": {"a": one, "x": two}}).encode()
    files = {f"whole/{one}": content(a=2, x=3), f"whole/{two}": content(x=4)}
    files |= {f"half/{one}": content(a=2), "other/model.gguf": b"GGUF" + bytes(20)}
    files |= {f"{folder}/net.{suffix}.index.json": index for folder in ("whole", "half")}
    with Hub({"owner/model": files}) as hub:
        code, envelope = manifest(hub, "owner/model:whole", tmp_path / "home")
        assert code == 0, envelope
        found = {name: entry[0] for name, entry in envelope["data"]["manifest"].items() if name != "__metadata__"}
        assert found == {"a": [2], "x": [4]} and "x" in envelope["data"]["notes"][0]
        assert envelope["data"].get("names", "") == ("" if suffix == "bin" else "converted")
        code, envelope = manifest(hub, "owner/model:half", tmp_path / "home")
        assert code == 1 and envelope["error"]["code"] == "manifest_invalid"
        assert envelope["error"]["details"]["missing"] == [two]
        for path in ("other", "other/model.gguf"):
            code, envelope = manifest(hub, f"owner/model:{path}", tmp_path / "home")
            assert code == 1 and envelope["error"]["code"] == "checkpoint_format", envelope
