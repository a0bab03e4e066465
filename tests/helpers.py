"""Assertions that tests of several packages share."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from port_kit.errors import PortKitError

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


def wait_until(condition: Callable[[], object], seconds: float = 60.0, pause: float = 0.01) -> None:
    """Poll a condition; fail if it does not hold within ``seconds``."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"the condition did not hold within {seconds:g} s"
        time.sleep(pause)
