"""Steps of running requests, which a worker writes to a file and the server of the same machine reads.

The server makes a folder and passes its path to its workers in the variable :data:`FOLDER`. Without it, as in offline
use, nothing is written.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from pathlib import Path

logger = logging.getLogger(__name__)

#: Environment variable with the folder of the files.
FOLDER = "PORT_KIT_PROGRESS"
#: Where the server makes the folder: in memory, because a file system may write a file to its disk at each renaming.
MEMORY = "/dev/shm"
#: Requests in a file. The one whose last step is the oldest is dropped first.
MAX_REQUESTS = 64


@dataclass(frozen=True)
class Progress:
    """Progress of a request; times are those of the monotonic clock, which all processes of a machine share.

    Attributes:
        step: denoising steps that are done.
        steps: all of them; 0 until the first one begins.
        began: time when the first step began.
        reported: time of the last step.
    """

    step: int = 0
    steps: int = 0
    began: float = 0.0
    reported: float = 0.0

    @property
    def percent(self) -> int:
        """Share of the steps that is done, rounded down; at most 99, because the steps are not the whole work."""
        return min(99, 100 * self.step // self.steps) if self.steps else 0

    def remaining(self, now: float) -> float | None:
        """Return the seconds that the remaining steps take, by the mean of those done; None before the first is."""
        if not self.step:
            return None
        mean = (self.reported - self.began) / self.step
        left = mean * (self.steps - self.step)
        return max(0.0, left - min(now - self.reported, mean))


class Reporter:
    """Writes the steps of a worker's requests, at once for all requests of a batch.

    Args:
        file: where to; None for nowhere.
    """

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self._requests: dict[str, Progress] = {}

    @classmethod
    def of_rank(cls, rank: int, ranks_per_request: int) -> Reporter:
        """Return the reporter of a rank; of the ranks that compute a request together, only the first writes.

        Args:
            rank: of the worker.
            ranks_per_request: number of ranks that compute each request; consecutive ones do.
        """
        folder = os.environ.get(FOLDER)
        writes = folder and rank % ranks_per_request == 0
        return cls(Path(str(folder), f"rank_{rank}.json") if writes else None)

    def report(self, steps: Mapping[str, tuple[int, int]]) -> None:
        """Write the progress of requests.

        Args:
            steps: per request the steps done and all steps; (0, 0) before the first one begins.
        """
        if self._file is None:
            return
        now = time.monotonic()
        for request, (step, total) in steps.items():
            known = self._requests.pop(request, Progress())
            self._requests[request] = Progress(step, total, known.began if step else now, now)
        for request in list(self._requests)[:-MAX_REQUESTS]:
            del self._requests[request]
        self._write(self._file)

    def _write(self, file: Path) -> None:
        partial = file.with_suffix(".partial")
        try:
            partial.write_text(json.dumps({name: astuple(one) for name, one in self._requests.items()}), "utf-8")
            partial.replace(file)
        except OSError as error:  # a full disk must not fail a video
            logger.warning("%s: %s; the steps of requests are not shown any more", file, error.strerror)
            self._file = None


def read(folder: str | os.PathLike[str] | None) -> dict[str, Progress]:
    """Return the progress of the requests of all workers; it may have finished ones."""
    found: dict[str, Progress] = {}
    for file in Path(folder).glob("rank_*.json") if folder else ():
        values = json.loads(file.read_text("utf-8"))
        found |= {request: Progress(*one) for request, one in values.items()}
    return found
