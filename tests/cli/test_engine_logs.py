"""Log levels of the engine's processes, as commands set them."""

from __future__ import annotations

import os

import pytest

from port_kit.cli.engine_logs import set_engine_logs

NAMES = ("VLLM_LOGGING_LEVEL", "VLLM_LOGGING_STREAM", "TQDM_DISABLE", "TORCH_LOGS")


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.setenv(name, "")  # restored in the end, also if it was not set
        monkeypatch.delenv(name)


def current(environment: dict[str, str]) -> list[str | None]:
    return [environment.get(name) for name in NAMES]


def test_errors_only_unless_asked() -> None:
    set_engine_logs()
    assert current(dict(os.environ))[:3] == ["ERROR", "ext://sys.stderr", "1"]
    set_engine_logs(1, override=True)
    assert current(dict(os.environ)) == ["INFO", "ext://sys.stderr", None, None]


def test_variables_of_the_user_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "DEBUG")
    monkeypatch.setenv("TORCH_LOGS", "+inductor")
    set_engine_logs()
    assert current(dict(os.environ)) == ["DEBUG", "ext://sys.stderr", "1", "+inductor"]
