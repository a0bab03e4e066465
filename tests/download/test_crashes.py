"""Processes killed at every step, concurrent processes, and file systems with and without working locks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from port_kit.download import FileRule, Policy, Recipe, Repository
from port_kit.download.progress import Progress
from port_kit.errors import DownloadError
from port_kit.testing.crash_injection import ForkServer
from port_kit.testing.hub import Fault, Hub
from tests.download.helpers import EXPECTED, MODEL_INDEX, WEIGHTS, assert_whole, bring, hashes, noise, orphans
from tests.helpers import wait_until

BIG = 64 << 20


@pytest.fixture(scope="module")
def fork_server() -> Iterator[ForkServer]:
    """The process that forks the runs to be killed."""
    with ForkServer() as running:
        yield running


@pytest.fixture(scope="module")
def big_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 MiB."""
    path = tmp_path_factory.mktemp("big") / "big.safetensors"
    path.write_bytes(noise(BIG, 7))
    return path


def big_recipe() -> Recipe:
    """A recipe of the big file alone."""
    return Recipe("big", (Repository(WEIGHTS, (FileRule("big.safetensors"),)),), MODEL_INDEX)


def wait_for(directory: Path, written: int) -> None:
    """Wait until the download has recorded this many bytes; the server is ahead by the size of socket buffers."""
    wait_until(lambda: sum(map(counts, directory.glob(".port_kit/parts/*/progress"))) >= written, pause=0.005)


class Notes(Progress):
    """Progress that records its notes."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def note(self, text: str) -> None:
        self.texts.append(text)


def counts(progress: Path) -> int:
    """Bytes that a part's file of counts adds up to."""
    data = progress.read_bytes()
    return sum(int.from_bytes(data[place : place + 8], "little") for place in range(0, len(data), 8))


@pytest.mark.parametrize(("number", "status"), [(signal.SIGKILL, -9), (signal.SIGTERM, -15), (signal.SIGINT, 130)])
def test_killed_at_sixty_percent_a_rerun_fetches_the_rest(
    fork_server: ForkServer, big_file: Path, tmp_path: Path, number: int, status: int
) -> None:
    with Hub({WEIGHTS: {"big.safetensors": big_file}}, bytes_per_second=100 << 20) as hub:
        one = Policy(connections=1, segment_size=256 << 20)
        child = fork_server.start(big_recipe(), tmp_path / "m", endpoint=hub.endpoint, token=False, policy=one)
        wait_for(tmp_path / "m", BIG * 6 // 10)
        child.kill(number)
        assert child.wait() == status
        assert not (tmp_path / "m/model_index.json").exists()
        hub.requests.clear()
        bring(big_recipe(), tmp_path / "m", hub, policy=one)
        (get,) = hub.gets()
        assert int(get.headers["Range"].removeprefix("bytes=").partition("-")[0]) >= BIG * 6 // 10
        assert (tmp_path / "m/big.safetensors").read_bytes() == big_file.read_bytes()
        assert orphans(tmp_path / "m") == []


def steps_of(fork_server: ForkServer, recipe: Recipe, hub: Hub, tmp_path: Path) -> int:
    """Return the number of disk operations of a complete run."""
    log = tmp_path / "steps"
    child = fork_server.start(recipe, tmp_path / "whole", endpoint=hub.endpoint, token=False, log=log)
    assert child.wait() == 0
    return int(log.read_text())


def killed_at_each_step(fork_server: ForkServer, recipe: Recipe, hub: Hub, tmp_path: Path, stride: int) -> None:
    """Kill a run before each ``stride``-th disk operation; after a rerun everything must be as it should."""
    count = steps_of(fork_server, recipe, hub, tmp_path)
    whole = hashes(tmp_path / "whole")
    for step in range(0, count, stride):
        directory = tmp_path / f"killed{step}"
        child = fork_server.start(recipe, directory, endpoint=hub.endpoint, token=False, kill_at=step)
        if child.wait() == 0:
            continue  # threads run in another order each time, and this run took fewer steps
        index = directory / "model_index.json"
        assert not index.exists() or hashes(directory) == whole, f"step {step}"
        assert bring(recipe, directory, hub).complete
        assert hashes(directory) == whole, f"step {step}"
        assert orphans(directory) == [], f"step {step}"


def test_killed_at_some_steps_a_rerun_completes(
    fork_server: ForkServer, hub: Hub, recipe: Recipe, tmp_path: Path
) -> None:
    killed_at_each_step(fork_server, recipe, hub, tmp_path, stride=11)


@pytest.mark.slow
def test_killed_at_every_step_a_rerun_completes(
    fork_server: ForkServer, hub: Hub, recipe: Recipe, tmp_path: Path
) -> None:
    killed_at_each_step(fork_server, recipe, hub, tmp_path, stride=1)


def run_processes(count: int, hub: Hub, directory: Path, prelude: str = "") -> list[subprocess.Popen[bytes]]:
    """Start downloads of the big file in fresh interpreters, into one directory."""
    script = f"""
{prelude}
from port_kit.download import *
recipe = Recipe("big", (Repository({WEIGHTS!r}, (FileRule("big.safetensors"),)),), {MODEL_INDEX!r})
download(recipe, {str(directory)!r}, endpoint={hub.endpoint!r}, token=False, use_cache=False)
"""
    environment = {**os.environ, **hub.environment}
    command = [sys.executable, "-c", script]
    return [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE) for _ in range(count)]


@pytest.mark.parametrize("count", [2, 5])
def test_several_processes_fetch_a_file_once(big_file: Path, tmp_path: Path, count: int) -> None:
    with Hub({WEIGHTS: {"big.safetensors": big_file}}, bytes_per_second=60 << 20) as hub:
        runs = run_processes(count, hub, tmp_path / "m")
        assert [(run.communicate(timeout=300)[1], run.returncode) for run in runs] == [(b"", 0)] * count
        assert len(hub.gets()) == 1 and hub.gets()[0].sent == BIG
        assert (tmp_path / "m/big.safetensors").read_bytes() == big_file.read_bytes()


def test_locks_that_do_nothing_cost_time_but_no_bytes(big_file: Path, tmp_path: Path) -> None:
    without = "import fcntl\nfcntl.flock = lambda *arguments: None"
    with Hub({WEIGHTS: {"big.safetensors": big_file}}, bytes_per_second=60 << 20) as hub:
        runs = run_processes(2, hub, tmp_path / "m", without)
        said = [run.communicate(timeout=300)[1].decode() for run in runs]
        assert 0 in [run.returncode for run in runs]
        for run, words in zip(runs, said, strict=True):
            assert run.returncode == 0 or "port_kit.errors.DownloadError" in words.splitlines()[-1], words
        bring(big_recipe(), tmp_path / "m", hub)
        assert (tmp_path / "m/big.safetensors").read_bytes() == big_file.read_bytes()
        assert bring(big_recipe(), tmp_path / "m", hub, verify=True).repaired == {}
        assert orphans(tmp_path / "m") == []


def test_the_lock_of_a_killed_process_blocks_no_other_process(
    fork_server: ForkServer, big_file: Path, tmp_path: Path
) -> None:
    with Hub({WEIGHTS: {"big.safetensors": big_file}}) as hub:
        hub.inject(Fault("get", stall=60))
        child = fork_server.start(big_recipe(), tmp_path / "m", endpoint=hub.endpoint, token=False)
        wait_until(hub.gets)
        child.kill()
        assert child.wait() == -signal.SIGKILL
        notes = Notes()
        assert bring(big_recipe(), tmp_path / "m", hub, progress=notes).complete
        assert notes.texts == []  # a download that waits for a lock notes it


def test_a_failed_run_keeps_what_it_has(hub: Hub, recipe: Recipe, tmp_path: Path) -> None:
    hub.inject(Fault("get", "big.safetensors", times=-1, cut=300_000))
    once = Policy(attempts=1, connections=1, segment_size=1 << 20)
    for _ in range(3):
        with pytest.raises(DownloadError):
            bring(recipe, tmp_path / "m", hub, policy=once)
    hub.faults.clear()
    hub.requests.clear()
    bring(recipe, tmp_path / "m", hub)
    assert_whole(tmp_path / "m")
    sent = sum(request.sent for request in hub.gets("big.safetensors"))
    assert sent < len(EXPECTED["transformer/big.safetensors"]) - 800_000
