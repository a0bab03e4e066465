"""Progress of a download on stderr: one bar on a terminal, a line per file elsewhere, or no output.

Everything is escaped before it is shown: names and reasons come from servers.
"""

from __future__ import annotations

import sys
import threading
import time
from typing import Any, TextIO

from port_kit.escape import escape_control_chars

_LINE_EVERY = 30.0


def human(count: float) -> str:
    """Format bytes: ``46.6 GB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


class Progress:
    """Count of bytes without output, for ``-q`` and ``--json``; base of the other classes. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.total = 0
        self.done = 0

    def begin(self, what: str, total: int, done: int = 0) -> None:
        """Start a stage of ``total`` bytes, ``done`` of which are there already."""
        self.total, self.done = total, done

    def advance(self, count: int) -> None:
        """Count bytes; a negative count discards bytes."""
        with self._lock:
            self.done += count

    def file_done(self, target: str, size: int) -> None:
        """A file has reached its place."""

    def note(self, text: str) -> None:
        """Something that a person should know."""

    def end(self) -> None:
        """The stage has ended."""


class LineProgress(Progress):
    """A line a file, and one every half minute, for logs."""

    def __init__(self, stream: TextIO | None = None) -> None:
        super().__init__()
        self._stream = stream or sys.stderr
        self._what, self._told = "", time.monotonic()

    def begin(self, what: str, total: int, done: int = 0) -> None:
        super().begin(what, total, done)
        self._what, self._told = what, time.monotonic()
        self.note(f"{what}: {human(total - done)} of {human(total)}")

    def advance(self, count: int) -> None:
        super().advance(count)
        now = time.monotonic()
        if now - self._told > _LINE_EVERY:
            self._told = now
            self.note(f"{self._what}: {human(self.done)} of {human(self.total)}")

    def file_done(self, target: str, size: int) -> None:
        self.note(f"  {target}  {human(size)}")

    def note(self, text: str) -> None:
        print(escape_control_chars(text), file=self._stream, flush=True)


class BarProgress(Progress):
    """One bar for all bytes, with rate and time left."""

    def __init__(self) -> None:
        super().__init__()
        self._bar: Any = None

    def begin(self, what: str, total: int, done: int = 0) -> None:
        from tqdm import tqdm

        super().begin(what, total, done)
        self._bar = tqdm(
            total=total, initial=done, desc=escape_control_chars(what), unit="B", unit_scale=True, file=sys.stderr
        )

    def advance(self, count: int) -> None:
        super().advance(count)
        if self._bar is not None:
            with self._lock:
                self._bar.update(count)

    def note(self, text: str) -> None:
        if self._bar is None:
            print(escape_control_chars(text), file=sys.stderr)
        else:
            self._bar.write(escape_control_chars(text), file=sys.stderr)

    def end(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def choose_progress(*, quiet: bool) -> Progress:
    """Return the progress for the terminal and the options."""
    if quiet:
        return Progress()
    return BarProgress() if sys.stderr.isatty() else LineProgress()
