"""``port-kit hub``: a folder served as a Hub, read by huggingface_hub and by the kit's own commands."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from port_kit.testing.hub_tree import read_repositories
from tests.helpers import raises
from tests.inspect import fake_repositories

FILES = fake_repositories.diffusers_model()
#: A session of huggingface_hub; it prints what it found.
SESSION = """
import json, sys
from pathlib import Path
from huggingface_hub import HfApi, HfFileSystem, hf_hub_download, snapshot_download
api, files = HfApi(), HfFileSystem()
folder = Path(snapshot_download("org/model", local_dir=sys.argv[1]))
print(json.dumps({
    "listed": sorted(api.list_repo_files("org/model")),
    "commit": api.model_info("org/model").sha,
    "saved": sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*")
                    if path.is_file() and ".cache" not in path.parts),
    "top": sorted(entry["name"] for entry in files.ls("org/model")),
    "transformer": sorted(entry["name"] for entry in files.ls("org/model/transformer")),
    "folder": files.isdir("org/model/transformer"),
    "glob": sorted(files.glob("org/model/*/config.json")),
    "index": Path(hf_hub_download("org/other", "model_index.json")).read_text(),
}))
"""


@pytest.fixture
def repositories(tmp_path: Path) -> Path:
    """A folder with two repositories."""
    root = tmp_path / "repositories"
    for name in ("model", "other"):
        fake_repositories.write(FILES, root / "org" / name)
    (root / "org" / "model" / ".cache").mkdir()
    (root / "org" / "model" / ".cache" / "state").write_text("hidden")
    return root


@contextmanager
def serving(folder: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run the command; yield its process and the address that it prints."""
    command = [sys.executable, "-m", "port_kit", "hub", str(folder), *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = next(line for line in process.stdout if "HF_ENDPOINT" in line)
        yield process, line.strip().removeprefix("export HF_ENDPOINT=")
    finally:
        process.kill()
        process.wait()


def run(endpoint: str, home: Path, *command: str) -> str:
    """Run Python with this endpoint as its Hub; return its stdout."""
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1"}
    done = subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_huggingface_hub_reads_it(repositories: Path, tmp_path: Path) -> None:
    with serving(repositories) as (_, endpoint):
        found = json.loads(run(endpoint, tmp_path / "home", "-c", SESSION, str(tmp_path / "copy")))
    assert found["listed"] == found["saved"] == sorted(FILES)
    assert re.fullmatch("[0-9a-f]{40}", found["commit"])
    top = {path.partition("/")[0] for path in FILES}
    assert found["top"] == sorted(f"org/model/{name}" for name in top)
    inside = [f"org/model/{path}" for path in FILES if path.startswith("transformer/")]
    assert found["transformer"] == sorted(inside) and found["folder"]
    assert found["glob"] == sorted(f"org/model/{path}" for path in FILES if re.fullmatch(r"\w+/config.json", path))
    assert found["index"] == (repositories / "org" / "other" / "model_index.json").read_text()


def test_the_kit_reads_a_folder_as_one_repository(repositories: Path, tmp_path: Path) -> None:
    with serving(repositories / "org" / "model", "--repository", "my/model") as (_, endpoint):
        found = json.loads(run(endpoint, tmp_path / "home", "-m", "port_kit", "inspect", "my/model", "--json"))
    assert found["data"]["path"] == "diffusers" and found["data"]["files"] == len(FILES)


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it(repositories: Path, sign: signal.Signals) -> None:
    with serving(repositories) as (process, _):
        process.send_signal(sign)
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == 0
    assert "stopped after 0 requests" in stderr and "Traceback" not in stderr


def test_a_port_that_is_taken(repositories: Path) -> None:
    with serving(repositories) as (_, endpoint):
        number = endpoint.rpartition(":")[2]
        command = [sys.executable, "-m", "port_kit", "hub", str(repositories), "--port", number, "--json"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1 and json.loads(done.stdout)["error"]["code"] == "hub_folder"


def _nothing(_: Path) -> None: ...


def _stray(folder: Path) -> None:
    (folder / "org").mkdir()
    (folder / "org" / "model.safetensors").write_bytes(b"1")


def _empty(folder: Path) -> None:
    (folder / "org" / "model").mkdir(parents=True)


@pytest.mark.parametrize(("make", "mentioned"), [(_nothing, ""), (_stray, "model.safetensors"), (_empty, "org/model")])
def test_a_folder_without_repositories(make: Callable[[Path], None], mentioned: str, tmp_path: Path) -> None:
    make(tmp_path)
    with raises("hub_folder", str(tmp_path), mentioned):
        read_repositories(tmp_path)
    with raises("hub_folder", "absent"):
        read_repositories(tmp_path / "absent")
