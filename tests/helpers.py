"""Assertions that tests of several packages share."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from port_kit.errors import PortKitError
from port_kit.upstream.series import installed_series

DATA = Path(__file__).parent / "data"


@contextmanager
def raises(code: str, *names: str) -> Iterator[pytest.ExceptionInfo[PortKitError]]:
    """Expect an error of the kit by its code.

    Args:
        code: a key of :data:`port_kit.errors.CODES`.
        names: names, numbers and paths of the test that the message must contain.
    """
    with pytest.raises(PortKitError) as caught:
        yield caught
    assert caught.value.code == code, caught.value
    for name in names:
        assert name in caught.value.message, caught.value


def slow(*values: object) -> list[Any]:
    """Return values of a parameter that are tested with ``-m slow`` only."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


def only_in(series: str, *modules: str) -> list[str]:
    """Return pytest's ``collect_ignore`` for modules that test an interface of one series of vLLM-Omni."""
    return [] if installed_series() == series else list(modules)


def run_ranks(function: Callable[..., None], args: tuple[object, ...], ranks: int, start_method: str = "fork") -> None:
    """Run ``function(rank, *args)`` in processes of this machine; kill them if they do not end within ten minutes."""
    from torch.multiprocessing.spawn import start_processes

    context = start_processes(function, args, nprocs=ranks, join=False, start_method=start_method)
    assert context is not None
    deadline = time.monotonic() + 600
    try:
        while not context.join(timeout=1):
            assert time.monotonic() < deadline, "the ranks did not end within 600 s"
    finally:
        for process in context.processes:
            process.kill()


def wait_until(condition: Callable[[], object], seconds: float = 60.0, pause: float = 0.01) -> None:
    """Poll a condition; fail if it does not hold within ``seconds``."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"the condition did not hold within {seconds:g} s"
        time.sleep(pause)
