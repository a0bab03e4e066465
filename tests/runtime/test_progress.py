"""Steps of requests in the file of a worker."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from port_kit.runtime import progress
from port_kit.runtime.progress import FOLDER, MAX_REQUESTS, MEMORY, Reporter, read


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder that a server gives its workers."""
    with tempfile.TemporaryDirectory(dir=MEMORY, ignore_cleanup_errors=True) as path:
        monkeypatch.setenv(FOLDER, path)
        yield Path(path)


def test_the_first_of_the_ranks_of_a_request_writes(folder: Path) -> None:
    for rank in range(4):
        Reporter.of_rank(rank, 2).report({f"of {rank}": (1, 2)})
    assert sorted(read(folder)) == ["of 0", "of 2"]


def test_nothing_is_written_without_a_server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(FOLDER, raising=False)
    monkeypatch.chdir(tmp_path)
    Reporter.of_rank(0, 1).report({"a": (1, 2)})
    assert not list(tmp_path.iterdir()) and read(None) == {}


def test_requests_of_a_batch_have_steps_and_a_mean_time(folder: Path) -> None:
    reporter = Reporter.of_rank(0, 1)
    reporter.report({"a": (0, 0), "b": (0, 0)})
    assert read(folder)["a"].remaining(time.monotonic()) is None
    reporter.report({"a": (0, 4), "b": (0, 2)})
    for step in (1, 2):
        time.sleep(0.05)
        reporter.report({"a": (step, 4), "b": (step, 2)})
    found = read(folder)
    assert {name: (one.step, one.steps) for name, one in found.items()} == {"a": (2, 4), "b": (2, 2)}
    took = found["a"].reported - found["a"].began
    assert took >= 0.1
    assert found["a"].remaining(found["a"].reported) == pytest.approx(took)
    assert found["b"].remaining(time.monotonic()) == 0


def test_the_oldest_requests_are_dropped(folder: Path) -> None:
    reporter = Reporter.of_rank(0, 1)
    reporter.report({"running": (1, 9)})
    for number in range(MAX_REQUESTS):
        reporter.report({str(number): (1, 1)})
        reporter.report({"running": (2, 9)})
    found = read(folder)
    assert len(found) == MAX_REQUESTS and "running" in found and "0" not in found


def test_a_reader_never_sees_a_part_of_a_file(folder: Path) -> None:
    reporter, ended = Reporter.of_rank(0, 1), threading.Event()

    def write() -> None:
        while not ended.is_set():
            reporter.report({str(number): (1, 50) for number in range(MAX_REQUESTS)})

    writer = threading.Thread(target=write)
    writer.start()
    try:
        assert all(len(read(folder)) in (0, MAX_REQUESTS) for _ in range(500))
    finally:
        ended.set()
        writer.join()


def test_a_folder_that_is_gone_fails_no_request(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    warnings: list[str] = []
    monkeypatch.setattr(progress.logger, "warning", lambda text, *values: warnings.append(text % values))
    reporter = Reporter.of_rank(0, 1)
    folder.rmdir()
    reporter.report({"a": (1, 2)})
    reporter.report({"a": (2, 2)})
    (warning,) = warnings
    assert str(folder) in warning and "No such file" in warning
    assert read(folder) == {}
