"""Many clients at once against one server: good requests, hostile ones, clients that leave; then one request again.

The server is started on a tiny model. Printed are, as JSON: requests by what was asked and what came back, latencies of
the good ones, of refusals and of ``/health``, the server's resident memory before and after each round, what is left in
its job store and its storage, and whether one request gives the same bytes before and after.

    python benchmarks/serving_storm.py --requests 100 --rounds 5
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import io
import json
import random
import statistics
import sys
import tempfile
import threading
import time
import wave
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import pairwise
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
LIMIT = 1800.0  # seconds that any request may take
#: Seconds for ``/health``, and growth of memory from round to round.
MAX_HEALTH, MAX_GROWTH = 2.0, 1.05


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
        if kind in RAW:
            return await self._send_raw(RAW[kind])
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

    async def _send_raw(self, data: bytes) -> str:
        """Send bytes over a connection, and wait until the server answers or closes it."""
        url = self.http.base_url
        reader, writer = await asyncio.open_connection(url.host, url.port)
        writer.write(data)
        try:
            answer = await asyncio.wait_for(reader.read(64), LIMIT)
        except ConnectionError:
            answer = b""
        writer.close()
        return str(answer[9:12], "latin-1") if answer else "closed"

    async def _cancel(self) -> str:
        job = (await self.http.post("/v1/videos", data=LONG, files=self.files)).json()["id"]
        await asyncio.sleep(random.uniform(0.2, 6.0))
        deleted = await self.http.delete(f"/v1/videos/{job}")
        after = (await self.http.get(f"/v1/videos/{job}")).json()
        await self.http.delete(f"/v1/videos/{job}")
        return f"{deleted.status_code}, then {after.get('status')}"


#: A script that makes FFmpeg read another file.
PLAYLIST = b"ffconcat version 1.0\nfile /etc/passwd\n"


@functools.cache
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
    "many values": lambda files: ({**GOOD, "image_reference": f"[{'[],' * 5_000_000}[]]"}, files[2:]),
    "long data URL": lambda files: (
        {**GOOD, "image_reference": f'{{"image_url": "data:{";a" * 5_000_000}"}}'},
        files[2:],
    ),
    "URL-encoded": lambda files: ({**GOOD, "image_reference": "[" * 10**6}, []),
    "long prompt": lambda files: ({**GOOD, "prompt": "rain " * 10**6}, files),
    "long name": lambda files: ({**GOOD, "q" * 10**6: "1"}, files),
    "repeated key": lambda files: ({**GOOD, "extra_params": '{"shift": 3, "shift": 4}'}, files),
}


_HEAD = f"POST /v1/videos/sync HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n".encode()
#: Bytes that a client sends before it waits: the server answers 400 or 408, or closes the connection.
RAW = {
    "no head": b"POST /v1/vid",
    "huge head": _HEAD + b"X: " + bytes(8 * 10**6),
    "two lengths": _HEAD + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "slow body": _HEAD + b"Content-Type: multipart/form-data; boundary=b\r\nContent-Length: 99\r\n\r\n--b",
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
    """Return the kinds of a round in a random order: 3 of 10 good, 5 hostile, and 2 of clients that leave."""
    hostile = iter([*BAD, *RAW] * requests)
    good = ["sync", "job", "sync"] if seed % 2 else ["job", "sync", "job"]
    fixed = [*good, "hang up", "cancelled job"]
    planned = [fixed[n % 10] if n % 10 < len(fixed) else next(hostile) for n in range(requests)]
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
        known = {job["id"] for job in (await http.get("/v1/videos")).json()["data"]}
        storm = Storm(http, files, before.content)
        resident = [memory()]
        health: list[float] = []
        ended = threading.Event()
        watch = threading.Thread(target=_watch_health, args=(url, health, ended))
        watch.start()
        started = time.perf_counter()
        for number in range(rounds):
            await asyncio.gather(*(storm.one(kind) for kind in plan(requests, seed + number)))
            resident.append(memory())
        seconds = time.perf_counter() - started
        ended.set()
        watch.join()
        after = await http.post("/v1/videos/sync", data=GOOD, files=files)
        left = {job["id"] for job in (await http.get("/v1/videos")).json()["data"]} - known
    return {
        "requests": len(storm.answers),
        "concurrent": requests,
        "seconds": round(seconds, 2),
        "outcomes": _outcomes(storm.answers),
        "statuses": dict(sorted(Counter(answer.outcome for answer in storm.answers).items())),
        "latency_s": _latencies([answer.seconds for answer in storm.answers if answer.kind in ("sync", "job")]),
        "refusal_s": _latencies([answer.seconds for answer in storm.answers if answer.kind in BAD] or [0.0]),
        "health_s": _latencies(health or [0.0]),
        "resident_mb": [round(value / 1e6, 1) for value in resident],
        "jobs_left": len(left),
        "same_bytes_after": after.status_code == 200 and after.content == before.content,
    }


def _watch_health(url: str, seconds: list[float], ended: threading.Event) -> None:
    """Ask for the server's health twice a second; a thread does not wait for the other clients of this process."""
    with httpx.Client(base_url=url, timeout=LIMIT) as http:
        while not ended.wait(0.5):
            started = time.perf_counter()
            http.get("/health").raise_for_status()
            seconds.append(time.perf_counter() - started)


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
    """Run the storm and print its report; return 1 if the server did not stand it."""
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
            "--upload-seconds",
            "20",
        )
        server = stack.enter_context(ApiServer(model, *options, folder=folder))
        report = asyncio.run(run(server.url, arguments.requests, arguments.rounds, arguments.seed, server.memory))
        report["files_left"] = len(list(server.storage.iterdir()))
        report["alive"] = server.is_alive()
        if not is_right(report):
            print(server.tail(), file=sys.stderr)
    print(json.dumps(report, indent=1))
    return 0 if is_right(report) and is_steady(report) else 1


def is_right(report: dict[str, Any]) -> bool:
    """Return True if all good requests were served alike, all hostile ones were refused, and nothing was left."""
    outcomes = report["outcomes"]
    good = all(set(outcomes.get(kind, {"200": 0})) == {"200"} for kind in ("sync", "job"))
    # a client that sends more than the server reads may see the end of the connection before the answer
    bad = all(
        set(counted) == {"400"}
        or (kind == "large upload" and all(one == "400" or "no answer" in one for one in counted))
        for kind, counted in outcomes.items()
        if kind in BAD
    )
    raw = all(set(counted) <= {"400", "408", "closed"} for kind, counted in outcomes.items() if kind in RAW)
    cancelled = set(outcomes.get("cancelled job", {"200, then cancelled": 0})) == {"200, then cancelled"}
    left = report["files_left"] or report["jobs_left"]
    return good and bad and raw and cancelled and report["same_bytes_after"] and report["alive"] and not left


def is_steady(report: dict[str, Any]) -> bool:
    """Return True if ``/health`` was fast, and memory did not grow from round to round after the first."""
    resident = report["resident_mb"][1:]
    grows = any(after > before * MAX_GROWTH for before, after in pairwise(resident))
    return report["health_s"]["max"] < MAX_HEALTH and not grows


if __name__ == "__main__":
    raise SystemExit(main())
