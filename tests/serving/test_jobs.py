"""Records of jobs: how many are kept."""

from __future__ import annotations

import asyncio

import pytest

from port_kit.serving import jobs
from port_kit.serving.jobs import Job, Jobs


def test_the_oldest_finished_jobs_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_omni.entrypoints.openai import stores
    from vllm_omni.entrypoints.openai.protocol.videos import VideoGenerationStatus, VideoResponse

    monkeypatch.setattr(jobs, "MAX_FINISHED", 2)
    monkeypatch.setattr(stores, "VIDEO_STORE", stores.AsyncDictStore())
    known = Jobs()

    async def run() -> list[str]:
        for name, status in (("a", "queued"), ("b", "completed"), ("c", "failed"), ("d", "completed"), ("e", "queued")):
            record = VideoResponse(model="m", prompt="p", id=name, status=VideoGenerationStatus(status))
            await stores.VIDEO_STORE.upsert(name, record)
            known.known[name] = Job(b"", {})
        assert await known.count_unfinished() == 2
        return [record.id for record in await stores.VIDEO_STORE.list_values()]

    assert asyncio.run(run()) == ["a", "c", "d", "e"] == list(known.known)
