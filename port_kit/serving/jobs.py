"""Jobs of several clients: each sees its own only.

A client is known by its API key. Without API keys, whoever knows the id of a job, a random one, may use it, and jobs
are not listed.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from port_kit.escape import quoted
from port_kit.serving.asgi import Refusal
from port_kit.serving.queue import Snapshot, cancelled

#: Path of one job, and of its video.
JOB = re.compile(r"/v1/videos/(?P<job>[^/]+)(/content)?")
#: Finished jobs whose records are kept. The oldest are forgotten first; their files expire.
MAX_FINISHED = 10_000
#: Values of ``limit`` of a list.
_LIMIT = re.compile(r"100|[1-9]?[0-9]", re.ASCII)


def digest(key: str) -> bytes:
    """Return what is stored of an API key."""
    return hashlib.sha256(key.encode()).digest()


def client_of(authorization: str | None, keys: Sequence[bytes]) -> bytes:
    """Return the client of a request: the digest of its API key, empty if the server has no keys.

    Args:
        authorization: header of the request.
        keys: digests of the server's keys.

    Raises:
        Refusal: status 401.
    """
    if not keys:
        return b""
    scheme, _, key = (authorization or "").partition(" ")
    given = digest(key)
    # all keys are compared, so that the time tells nothing
    matches = [secrets.compare_digest(given, known) for known in keys]
    if scheme.lower() != "bearer" or not any(matches):
        raise Refusal(401, "the request has no valid API key; send it as 'Authorization: Bearer KEY'")
    return given


@dataclass
class Job:
    """A job of a client.

    Attributes:
        owner: the client.
        settings: shown in its record.
        cancelled: its record if it was cancelled; vLLM-Omni keeps none.
    """

    owner: bytes
    settings: Mapping[str, Any]
    cancelled: dict[str, Any] | None = None


@dataclass
class Jobs:
    """All jobs of the server by id."""

    known: dict[str, Job] = field(default_factory=dict)

    def check_owner(self, job: str, client: bytes) -> None:
        """Refuse a job of another client as if it did not exist."""
        found = self.known.get(job)
        if found is not None and found.owner != client:
            raise Refusal(404, "Video not found")

    async def count_unfinished(self) -> int:
        """Return the number of jobs that wait or run, and forget the oldest jobs beyond :data:`MAX_FINISHED`."""
        from vllm_omni.entrypoints.openai.stores import VIDEO_STORE

        records = await VIDEO_STORE.list_values()  # the oldest first
        finished = [record.id for record in records if record.status not in ("queued", "in_progress")]
        for job in finished[: max(0, len(finished) - MAX_FINISHED)]:
            await VIDEO_STORE.pop(job)
            self.known.pop(job, None)
        ended = [name for name, job in self.known.items() if job.cancelled is not None]
        for name in ended[: max(0, len(ended) - MAX_FINISHED)]:
            del self.known[name]
        return len(records) - len(finished)

    def describe(self, record: dict[str, Any], state: Snapshot) -> dict[str, Any]:
        """Return a job's record with its place in the queue, its steps, its settings, and the video's true length."""
        found = self.known.get(str(record["id"]))
        frames, fps = record.get("num_frames"), record.get("fps")
        length = {"seconds": f"{frames / fps:.2f}"} if frames and fps else {}
        described = {**record, **(found.settings if found else {}), **length}
        return {**described, **state.fields(described)}

    def cancel(self, record: dict[str, Any], state: Snapshot) -> None:
        """Keep the record of a job that was cancelled.

        Args:
            record: vLLM-Omni's, before the job was deleted.
            state: at that time.
        """
        if (found := self.known.get(record["id"])) is not None:
            found.cancelled = cancelled(self.describe(record, state))

    def listing(
        self, listed: dict[str, Any], client: bytes, query: Mapping[str, str], state: Snapshot
    ) -> dict[str, Any]:
        """Return a page of a client's jobs.

        Args:
            listed: vLLM-Omni's list of all jobs, the newest first.
            client: who asks.
            state: of the engine.
            query: ``limit``, ``after`` and ``order``, as vLLM-Omni has them.

        Raises:
            Refusal: a value of the query is not valid.
        """
        if unknown := [name for name in query if name not in ("limit", "after", "order")]:
            raise Refusal(400, f"the query has the unknown name {quoted(unknown[0])}; known are limit, after and order")
        limit, order = query.get("limit", "100"), query.get("order", "desc")
        if not _LIMIT.fullmatch(limit) or order not in ("asc", "desc"):
            raise Refusal(
                400, f"limit is {quoted(limit)} and order is {quoted(order)}; 0 to 100, and asc or desc are required"
            )
        own = [self.describe(job, state) for job in listed["data"] if self._is_of(job["id"], client)]
        own += [job.cancelled for job in self.known.values() if job.cancelled is not None and job.owner == client]
        own.sort(key=lambda job: job["created_at"], reverse=True)
        own = own[::-1] if order == "asc" else own
        ids = [job["id"] for job in own]
        if "after" in query:
            own = own[ids.index(query["after"]) + 1 :] if query["after"] in ids else []
        page = own[: int(limit)]
        first, last = (page[0]["id"], page[-1]["id"]) if page else (None, None)
        return {**listed, "data": page, "has_more": len(page) < len(own), "first_id": first, "last_id": last}

    def _is_of(self, job: str, client: bytes) -> bool:
        found = self.known.get(job)
        return found is not None and found.owner == client
