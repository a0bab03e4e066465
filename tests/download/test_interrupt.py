"""Ctrl-C at every stage of the real commands: they end with exit code 130 and leave no process."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from port_kit.download import Policy, Recipe
from port_kit.download.http import HttpClient
from port_kit.testing.gitserver import GitRemote, GitServer
from port_kit.testing.hub import Fault, Hub
from tests.download.helpers import WEIGHTS, bring, noise
from tests.helpers import slow, wait_until

#: Seconds that an interrupted command may take to end; the servers here are silent for longer.
DEADLINE = 15


@pytest.fixture
def hub() -> Iterator[Hub]:
    """A Hub with a file that takes a while."""
    with Hub({WEIGHTS: {"f": noise(20 << 20)}}, bytes_per_second=1 << 20) as running:
        yield running


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe of that file."""
    path = tmp_path / "r.toml"
    path.write_text(
        f'name = "r"\nmodel_index = {{ _class_name = "T", _diffusers_version = "1" }}\n'
        f'[[repositories]]\nrepo_id = "{WEIGHTS}"\nfiles = [{{ pattern = "f" }}]\n'
    )
    return path


def _heed_interrupts() -> None:
    """Restore the default handler: processes started in the background by a shell ignore the signal."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def interrupted(ready: Callable[[], object], *arguments: object, **variables: str) -> tuple[str, str]:
    """Start a command, interrupt it once it is ``ready``, and return its output. Its process group must end."""
    command = [sys.executable, "-m", "port_kit", *map(str, arguments)]
    process = subprocess.Popen(
        command,
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=_heed_interrupts,
    )
    try:
        wait_until(lambda: process.poll() is not None or ready())
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=DEADLINE)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert "Traceback" not in err and "run the same command again" in err
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
    return out, err


@pytest.mark.parametrize("kind", ["revision", "tree", "head", "get"])
def test_while_a_server_is_silent(hub: Hub, recipe: Path, tmp_path: Path, kind: str) -> None:
    hub.inject(Fault(kind, times=-1, stall=20))
    options = ("download", recipe, "--output-dir", tmp_path / "m")
    interrupted(lambda: any(request.kind == kind for request in hub.requests), *options, **hub.environment)


def test_while_bytes_arrive_and_as_json(hub: Hub, recipe: Path, tmp_path: Path) -> None:
    options = ("download", recipe, "--output-dir", tmp_path / "m", "--json")
    out, _ = interrupted(lambda: sum(request.sent for request in hub.gets()) > 2 << 20, *options, **hub.environment)
    envelope = json.loads(out)
    assert not envelope["ok"] and envelope["error"]["code"] == "interrupted"


@pytest.mark.parametrize("fault", [Fault("get", times=-1, status=503), Fault("head", times=-1, status=429)])
def test_while_it_waits_for_another_attempt(hub: Hub, recipe: Path, tmp_path: Path, fault: Fault) -> None:
    hub.inject(Fault(fault.kind, times=-1, status=fault.status, headers={"Retry-After": "60"}))
    options = ("download", recipe, "--output-dir", tmp_path / "m")
    interrupted(lambda: any(request.kind == fault.kind for request in hub.requests), *options, **hub.environment)


def test_in_a_pause_that_the_signal_does_not_end() -> None:
    """A signal that reaches another thread, or that arrives just before the pause begins, wakes no system call."""
    own = signal.signal(signal.SIGINT, signal.default_int_handler)
    other = threading.Timer(0.2, lambda: signal.pthread_kill(threading.get_ident(), signal.SIGINT))
    other.start()
    begun = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            HttpClient(Policy()).sleep(30)
    finally:
        signal.signal(signal.SIGINT, own)
    assert time.monotonic() - begun < 10


def test_while_it_hashes_a_large_file(hub: Hub, recipe: Path, tmp_path: Path) -> None:
    """Hashing a sparse file of 20 GB takes many seconds."""
    hub.bytes_per_second = None
    bring(Recipe.from_toml(recipe), tmp_path / "m", hub)
    lock = json.loads((tmp_path / "m/port.lock").read_text())
    lock["files"]["f"]["final_size"] = 20 << 30
    (tmp_path / "m/port.lock").write_text(json.dumps(lock))
    os.truncate(tmp_path / "m/f", 20 << 30)
    held = tmp_path / "m/.port_kit/lock"
    before = held.stat().st_mtime_ns
    options = ("download", recipe, "--output-dir", tmp_path / "m", "--verify", "--offline")
    interrupted(lambda: held.stat().st_mtime_ns != before, *options, **hub.environment)
    assert (tmp_path / "m/model_index.json").is_file()


@pytest.mark.parametrize("name", ["download", *slow("remove")])
def test_while_it_waits_for_another_process(hub: Hub, recipe: Path, tmp_path: Path, name: str) -> None:
    hub.bytes_per_second = None
    bring(Recipe.from_toml(recipe), tmp_path / "m", hub)
    with (tmp_path / "m/.port_kit/lock").open("a") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        begun = time.monotonic()
        options = (
            ("download", recipe, "--output-dir", tmp_path / "m") if name == "download" else ("remove", tmp_path / "m")
        )
        _, err = interrupted(lambda: time.monotonic() - begun > 9, *options, **hub.environment)
    assert "waiting for another download" in err and (tmp_path / "m/model_index.json").is_file()


@pytest.mark.parametrize("stage", ["asking", "fetching"])
def test_while_git_waits_for_a_server(hub: Hub, recipe: Path, tmp_path: Path, stage: str) -> None:
    hub.bytes_per_second = None
    remote = GitRemote(tmp_path / "remotes/code", {"zz_slow/__init__.py": ""})
    with GitServer(tmp_path / "remotes") as server:
        with recipe.open("a") as stream:
            stream.write(
                f'[[code]]\nname = "zz_slow"\nurl = "{server.url("code")}"\npackages = ["zz_slow"]\n'
                f'commit = "{remote.head}"\n'
            )

        def ready() -> bool:
            whole = (tmp_path / "m/f").exists()
            server.stall = 20 if stage == "asking" or whole else 0
            return len(server.requests) > (2 if whole else 0) and (stage == "asking" or whole)

        server.stall = 20 if stage == "asking" else 0
        options = ("download", recipe, "--output-dir", tmp_path / "m", "--with-reference")
        interrupted(ready, *options, **hub.environment, PORT_KIT_HOME=str(tmp_path / "home"))
    assert not [path for path in (tmp_path / "home").rglob("*") if path.is_file()]


def test_while_it_converts(tmp_path: Path) -> None:
    torch.save({f"layer.{n}": torch.randn(1024, 1024) for n in range(96)}, tmp_path / "x.pth")
    ready = lambda: list(tmp_path.glob(".x.safetensors.*.tmp"))  # noqa: E731
    interrupted(ready, "convert", tmp_path / "x.pth", tmp_path / "x.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["x.pth"]
