"""Many clients at once against one server: good requests, hostile ones, clients that leave; then one request again.

The server is started on a tiny model. Printed are, as JSON: requests by what was asked and what came back, latencies of
the good ones, of refusals and of ``/health``, the server's resident memory before and after each round, what is left in
its job store and its storage, and whether one request gives the same bytes before and after.

    python benchmarks/serving_storm.py --requests 50 --rounds 3
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import random
import statistics
import sys
import tempfile
import time
import wave
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

from port_kit.models.dreamid_omni import PORT
from port_kit.testing.server import ApiServer
from port_kit.testing.tiny_port import download_tiny

#: What one request asks for. Clients that hang up ask for so many steps that they cannot be done before.
GOOD = {"prompt": "two people talk", "width": "96", "height": "64", "num_inference_steps": "1", "seed": "3"}
LONG = {**GOOD, "num_inference_steps": "200"}
KEY = "storm"
LIMIT = 600.0  # seconds that any request may take


@dataclass
class Answer:
    """What one client met: the kind of request, the outcome in words, and the seconds from sending to the end."""

    kind: str
    outcome: str
    seconds: float


@dataclass
class Storm:
    """All clients of one round, against one server.

    Attributes:
        http: client of the server; its pool must hold all requests at once.
        wanted: the bytes that the good request gives.
    """

    http: httpx.AsyncClient
    files: list[tuple[str, tuple[str, bytes, str]]]
    wanted: bytes
    answers: list[Answer] = field(default_factory=list)

    async def one(self, kind: str) -> None:
        """Send one request of a kind and note what came of it."""
        started = time.perf_counter()
        try:
            outcome = await self._send(kind)
        except httpx.HTTPError as error:
            outcome = f"no answer ({type(error).__name__}: {error})"
        self.answers.append(Answer(kind, outcome, time.perf_counter() - started))

    async def _send(self, kind: str) -> str:
        if kind == "sync":
            return self._video(await self.http.post("/v1/videos/sync", data=GOOD, files=self.files))
        if kind == "job":
            return await self._job()
        if kind == "hang up":
            return await self._hang_up()
        if kind == "cancelled job":
            return await self._cancel()
        fields, files = BAD[kind](self.files)
        response = await self.http.post("/v1/videos/sync", data=fields, files=files)
        return str(response.status_code)

    def _video(self, response: httpx.Response) -> str:
        if response.status_code != 200:
            return str(response.status_code)
        return "200" if response.content == self.wanted else "200 with other bytes"

    async def _job(self) -> str:
        job = (await self.http.post("/v1/videos", data=GOOD, files=self.files)).json()["id"]
        while (state := (await self.http.get(f"/v1/videos/{job}")).json())["status"] in ("queued", "in_progress"):
            await asyncio.sleep(0.3)
        if state["status"] != "completed":
            return str(state["error"])
        outcome = self._video(await self.http.get(f"/v1/videos/{job}/content"))
        await self.http.delete(f"/v1/videos/{job}")
        return outcome

    async def _hang_up(self) -> str:
        """Leave after a while that ends before, while or after the request is computed, as it happens."""
        try:
            await self.http.post("/v1/videos/sync", data=LONG, files=self.files, timeout=random.uniform(0.2, 6.0))
        except httpx.TimeoutException:
            return "left"
        return "served"

    async def _cancel(self) -> str:
        job = (await self.http.post("/v1/videos", data=LONG, files=self.files)).json()["id"]
        await asyncio.sleep(random.uniform(0.2, 6.0))
        deleted = await self.http.delete(f"/v1/videos/{job}")
        after = await self.http.get(f"/v1/videos/{job}")
        return f"{deleted.status_code}, then {after.status_code}"


#: A script that makes FFmpeg read another file.
PLAYLIST = b"ffconcat version 1.0\nfile /etc/passwd\n"


def _huge() -> bytes:
    """Return a picture of 177 million pixels in a few kB."""
    buffer = io.BytesIO()
    Image.new("1", (13_300, 13_300)).save(buffer, "PNG")
    return buffer.getvalue()


Files = list[tuple[str, tuple[str, bytes, str]]]
BAD: dict[str, Callable[[Files], tuple[dict[str, str], Files]]] = {
    "no references": lambda files: (GOOD, []),
    "bad height": lambda files: ({**GOOD, "height": "100"}, files),
    "no steps": lambda files: ({**GOOD, "num_inference_steps": "0"}, files),
    "broken picture": lambda files: (GOOD, [(files[0][0], ("a.png", files[0][1][1][:80], "image/png")), *files[1:]]),
    "broken voice": lambda files: (GOOD, [*files[:-1], (files[-1][0], ("b.wav", b"RIFF junk", "audio/wav"))]),
    "unknown option": lambda files: ({**GOOD, "extra_params": '{"shfit": 3}'}, files),
    "unknown field": lambda files: ({**GOOD, "nonsense": "1"}, files),
    "huge picture": lambda files: (GOOD, [(files[0][0], ("a.png", _huge(), "image/png")), *files[1:]]),
    "playlist": lambda files: (GOOD, [*files[:-1], (files[-1][0], ("b.wav", PLAYLIST, "audio/wav"))]),
    "internal address": lambda files: ({**GOOD, "image_reference": '{"image_url": "http://127.0.0.1/"}'}, files[1:]),
    "foreign LoRA": lambda files: ({**GOOD, "lora": '{"name": "x", "path": "/etc/passwd"}'}, files),
    "large upload": lambda files: (GOOD, [*files, ("whatever", ("a.bin", bytes(70 * 10**6), "video/mp4"))]),
    "overflow": lambda files: ({**GOOD, "extra_params": '{"video_cfg_scale": 1e308}'}, files),
    "deep JSON": lambda files: ({**GOOD, "extra_params": "[" * 100_000}, files),
}


def references() -> Files:
    """Two pictures and two voices of noise, as files of a form."""
    source = np.random.default_rng(0)
    files: Files = []
    for name in "ab":
        buffer = io.BytesIO()
        Image.fromarray(source.integers(0, 255, (64, 48, 3), dtype=np.uint8)).save(buffer, "PNG")
        files.append(("input_references", (f"{name}.png", buffer.getvalue(), "image/png")))
    for name in "ab":
        buffer = io.BytesIO()
        with wave.open(buffer, "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(16_000)
            file.writeframes(source.integers(-8000, 8000, 40_000, dtype=np.int16).tobytes())
        files.append(("input_references", (f"{name}.wav", buffer.getvalue(), "audio/wav")))
    return files


def plan(requests: int, seed: int) -> list[str]:
    """Return the kinds of a round in a random order: half good, a fifth bad, the rest clients that leave."""
    kinds = ["sync", "job", "sync", list(BAD)[0], "hang up", "job", "sync", list(BAD)[1], "cancelled job", "job"]
    bad = iter(list(BAD) * requests)
    planned = [next(bad) if kinds[n % 10] in BAD else kinds[n % 10] for n in range(requests)]
    random.Random(seed).shuffle(planned)
    return planned


async def run(url: str, requests: int, rounds: int, seed: int, memory: Callable[[], int]) -> dict[str, Any]:
    """Run all rounds, each with all its requests at once, and return the report."""
    random.seed(seed)
    # No connection is used twice: the server closes idle ones, also just when the next request is on its way.
    limits = httpx.Limits(max_connections=requests + 8, max_keepalive_connections=0)
    headers = {"Authorization": f"Bearer {KEY}"}
    async with httpx.AsyncClient(base_url=url, timeout=LIMIT, limits=limits, headers=headers) as http:
        files = references()
        before = await http.post("/v1/videos/sync", data=GOOD, files=files)
        before.raise_for_status()
        storm = Storm(http, files, before.content)
        resident = [memory()]
        health: list[float] = []
        watch = asyncio.create_task(_watch_health(url, health))
        started = time.perf_counter()
        for number in range(rounds):
            await asyncio.gather(*(storm.one(kind) for kind in plan(requests, seed + number)))
            resident.append(memory())
        seconds = time.perf_counter() - started
        watch.cancel()
        after = await http.post("/v1/videos/sync", data=GOOD, files=files)
        left = (await http.get("/v1/videos")).json()["data"]
    return {
        "requests": len(storm.answers),
        "concurrent": requests,
        "seconds": round(seconds, 2),
        "outcomes": _outcomes(storm.answers),
        "statuses": dict(sorted(Counter(answer.outcome for answer in storm.answers).items())),
        "latency_s": _latencies([answer.seconds for answer in storm.answers if answer.kind in ("sync", "job")]),
        "refusal_s": _latencies([answer.seconds for answer in storm.answers if answer.kind in BAD]),
        "health_s": _latencies(health or [0.0]),
        "resident_mb": [round(value / 1e6, 1) for value in resident],
        "jobs_left": len(left),
        "same_bytes_after": after.status_code == 200 and after.content == before.content,
    }


async def _watch_health(url: str, seconds: list[float]) -> None:
    """Ask for the server's health twice a second, over connections of its own."""
    async with httpx.AsyncClient(base_url=url, timeout=LIMIT) as http:
        while True:
            started = time.perf_counter()
            (await http.get("/health")).raise_for_status()
            seconds.append(time.perf_counter() - started)
            await asyncio.sleep(0.5)


def _outcomes(answers: list[Answer]) -> dict[str, dict[str, int]]:
    kinds: dict[str, Counter[str]] = {}
    for answer in answers:
        kinds.setdefault(answer.kind, Counter())[answer.outcome] += 1
    return {kind: dict(counted) for kind, counted in sorted(kinds.items())}


def _latencies(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    return {
        "median": round(statistics.median(ordered), 3),
        "p95": round(ordered[int(0.95 * (len(ordered) - 1))], 3),
        "max": round(ordered[-1], 3),
    }


def main() -> int:
    """Run the storm and print its report; return 1 where a good request failed or a bad one was not refused."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=50, help="at once")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--model", type=Path, default=None, help="a model directory of DreamID-Omni; a tiny one is made"
    )
    arguments = parser.parse_args()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="port-kit-storm-")))
        model = arguments.model or download_tiny(PORT, folder / "model").directory
        options = (
            "--dtype",
            "float32",
            "--enforce-eager",
            "--api-key",
            KEY,
            "--max-queue",
            f"{arguments.requests + 8}",
        )
        server = stack.enter_context(ApiServer(model, *options, folder=folder))
        report = asyncio.run(run(server.url, arguments.requests, arguments.rounds, arguments.seed, server.memory))
        report["files_left"] = len(list(server.storage.iterdir()))
        report["alive"] = server.is_alive()
        if not is_right(report):
            print(server.tail(), file=sys.stderr)
    print(json.dumps(report, indent=1))
    return 0 if is_right(report) else 1


def is_right(report: dict[str, Any]) -> bool:
    """Whether every good request was served alike, every bad one refused with 400, and nothing was left."""
    outcomes = report["outcomes"]
    good = all(set(outcomes.get(kind, {"200": 0})) == {"200"} for kind in ("sync", "job"))
    bad = all(set(counted) == {"400"} for kind, counted in outcomes.items() if kind in BAD)
    cancelled = set(outcomes.get("cancelled job", {"200, then 404": 0})) == {"200, then 404"}
    left = report["files_left"] or report["jobs_left"]
    return good and bad and cancelled and report["same_bytes_after"] and report["alive"] and not left


if __name__ == "__main__":
    raise SystemExit(main())
