"""One request of a page, from its form to its clip, as events."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from port_kit.page.client import JobClient, JobError, Upload
from port_kit.page.texts import progress_text, settings_of

#: Seconds between two looks at a job.
POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Progress:
    """A job that is not finished.

    Attributes:
        job: its id.
        text: one line for users.
        percent: None if it is not known.
    """

    job: str
    text: str
    percent: float | None


@dataclass(frozen=True)
class Clip:
    """A finished clip.

    Attributes:
        path: of the MP4.
        settings: by name, for users.
    """

    path: Path
    settings: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Cancelled:
    """A job that somebody cancelled."""


async def run_job(
    client: JobClient, form: Mapping[str, str], files: Sequence[Upload], folder: Path
) -> AsyncIterator[Progress | Clip | Cancelled]:
    """Run a job to its end, and leave nothing of it on the server. A caller that leaves cancels it.

    Args:
        client: of the server.
        form: of the request.
        files: references.
        folder: where the clip is written.

    Raises:
        JobError: the server refused the request, or failed.
    """
    started, record = time.monotonic(), await client.submit(form, files)
    job, is_kept = str(record["id"]), True
    try:
        while record.get("status") != "completed":
            yield Progress(job, progress_text(record, time.monotonic() - started), _percent(record))
            await asyncio.sleep(POLL_SECONDS)
            try:
                record = await client.status(job)
            except JobError as error:
                if error.status != 404:
                    raise
                record = {"status": "cancelled"}
            if record.get("status") == "cancelled":
                is_kept = False
                yield Cancelled()
                return
        path = folder / f"{job}.mp4"
        path.write_bytes(await client.content(job))
        settings = settings_of(record, form, time.monotonic() - started)
    finally:
        if is_kept:
            with suppress(JobError):  # the clip, or the first error, is what counts
                await client.delete(job)
    yield Clip(path, settings)


def _percent(record: Mapping[str, Any]) -> float | None:
    """Return the progress in percent; None for a job that waits, or whose steps are not known."""
    is_known = record.get("step") is not None or record.get("progress")
    return float(record.get("progress") or 0) if is_known and not record.get("queue_position") else None
