"""The video endpoints of the real server, tiny weights: videos with audio, jobs, errors, disconnected clients."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import re
import subprocess
import sys
import time
import wave
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import ModuleType
from typing import Any

import av
import httpx
import numpy as np
import psutil
import pytest
from PIL import Image

from port_kit.pipeline.media import measure_mp4
from port_kit.testing.server import ApiServer
from tests.audio_files import flac, mp4, ogg, opus, wav
from tests.helpers import wait_until
from tests.serving import comfyui
from tests.serving.helpers import EXAMPLES, run_client, serving
from tests.serving.pages import benchmark_command, client_commands, run_written
from tests.test_references import sound

LIMIT = 300.0
#: Answer to a deletion, but for the id.
DELETED = {"deleted": True, "object": "video.deleted"}
#: Seconds that finished files are kept.
KEPT = 20
#: API key that the load benchmark uses.
KEY = "storm"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    """A server of the tiny DreamID-Omni."""
    options = ("--keep-seconds", str(KEPT), "--api-key", KEY)
    sweep = {"VLLM_OMNI_SERVER_STORAGE__TTL_SWEEP_INTERVAL": "1"}
    with serving("dreamid_omni", tmp_path_factory.mktemp("dreamid"), *options, **sweep) as running:
        yield running


@pytest.fixture(scope="module")
def http(server: ApiServer) -> httpx.Client:
    return httpx.Client(base_url=server.url, timeout=LIMIT, headers={"Authorization": f"Bearer {KEY}"})


@pytest.fixture(scope="module")
def good(load_test: ModuleType) -> dict[str, str]:
    return load_test.GOOD


@pytest.fixture(scope="module")
def files(load_test: ModuleType) -> list[Any]:
    return load_test.references()


def _cpu(server: ApiServer) -> float:
    """Processor seconds that the server has used: the cost of work, independent of other load on the machine."""
    process = psutil.Process(server.pid)
    return sum(sum(one.cpu_times()[:2]) for one in [process, *process.children(recursive=True)])


@pytest.fixture(scope="module")
def first(server: ApiServer, http: httpx.Client, good: dict[str, str], files: list[Any]) -> tuple[bytes, float]:
    """The good request's video, and the processor seconds that it took."""
    before = _cpu(server)
    response = http.post("/v1/videos/sync", data=good, files=files)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "video/mp4"
    return response.content, _cpu(server) - before


@pytest.fixture(scope="module")
def forgotten(http: httpx.Client, good: dict[str, str], files: list[Any], first: tuple[bytes, float]) -> str:
    """A finished job that is not deleted."""
    job = http.post("/v1/videos", data=good, files=files).json()["id"]
    assert _finished(http, job)["status"] == "completed"
    return job


def _finished(http: httpx.Client, job: str) -> dict[str, Any]:
    states: list[dict[str, Any]] = []

    def ended() -> bool:
        states.append(http.get(f"/v1/videos/{job}").json())
        return states[-1]["status"] not in ("queued", "in_progress")

    wait_until(ended, LIMIT, pause=0.2)
    return states[-1]


def test_a_sync_request_gives_a_video_with_audio(first: tuple[bytes, float], tmp_path: Path) -> None:
    path = tmp_path / "video.mp4"
    path.write_bytes(first[0])
    found = measure_mp4(path)
    assert (found.width, found.height, found.frames, found.fps) == (96, 64, 121, 24)
    assert found.video_seconds == pytest.approx(121 / 24, abs=0.05)
    assert found.sample_rate == 16_000
    assert found.audio_seconds == pytest.approx(80_384 / 16_000, abs=0.1)
    assert found.peak > 0


def test_a_job_gives_the_same_video_and_is_kept_until_it_expires(
    server: ApiServer, http: httpx.Client, first: tuple[bytes, float], forgotten: str
) -> None:
    job = http.get(f"/v1/videos/{forgotten}").json()
    assert (job["status"], job["progress"], job["num_frames"], job["fps"]) == ("completed", 100, 121, 24)
    assert job["expires_at"] - job["completed_at"] == KEPT
    assert forgotten in [entry["id"] for entry in http.get("/v1/videos").json()["data"]]
    content = http.get(f"/v1/videos/{forgotten}/content")
    assert (content.status_code, content.headers["content-type"]) == (200, "video/mp4")
    assert content.content == first[0]


def _frames(video: bytes) -> np.ndarray:
    """All frames of a file, int16 (F, H, W, 3)."""
    with av.open(io.BytesIO(video)) as container:
        return np.stack([frame.to_ndarray(format="rgb24").astype(np.int16) for frame in container.decode(video=0)])


def test_another_seed_gives_another_video(
    http: httpx.Client, good: dict[str, str], files: list[Any], first: tuple[bytes, float]
) -> None:
    response = http.post("/v1/videos/sync", data={**good, "seed": "4"}, files=files)
    assert response.status_code == 200
    assert np.abs(_frames(response.content) - _frames(first[0])).mean() > 5


def test_references_as_data_urls_equal_uploads(
    http: httpx.Client, good: dict[str, str], files: list[Any], first: tuple[bytes, float]
) -> None:
    kinds: dict[str, list[dict[str, str]]] = {"image": [], "audio": []}
    for _, (_, content, media_type) in files:
        kind = media_type.partition("/")[0]
        url = f"data:{media_type};base64,{base64.b64encode(content).decode()}"
        kinds[kind].append({f"{kind}_url": url})
    fields = {**good, **{f"{kind}_reference": json.dumps(found) for kind, found in kinds.items()}}
    response = http.post("/v1/videos/sync", data=fields)
    assert response.status_code == 200, response.text
    assert response.content == first[0]


def _voices(files: list[Any], change: Callable[[bytes], bytes]) -> list[Any]:
    """Return the good references with changed voices."""
    return [
        (field, (name, change(content) if kind.startswith("audio") else content, kind))
        for field, (name, content, kind) in files
    ]


def _converted(container: str, codec: str, rate: int) -> Callable[[bytes], bytes]:
    def convert(content: bytes) -> bytes:
        with wave.open(io.BytesIO(content)) as file:
            assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (16_000, 1, 2)
            samples = np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(np.float32) / 2**15
        return sound(container, codec, rate=rate, samples=samples)

    return convert


CODECS = [("flac", "flac", 16_000), ("ogg", "libopus", 48_000), ("ipod", "aac", 16_000)]


@pytest.mark.parametrize(("container", "codec", "rate"), CODECS)
def test_voices_of_other_formats_are_decoded(
    http: httpx.Client,
    good: dict[str, str],
    files: list[Any],
    first: tuple[bytes, float],
    container: str,
    codec: str,
    rate: int,
) -> None:
    answer = http.post("/v1/videos/sync", data=good, files=_voices(files, _converted(container, codec, rate)))
    assert answer.status_code == 200, answer.text[:300]
    assert (answer.content == first[0]) == (codec == "flac"), "only FLAC is lossless"


def test_voices_of_another_format_may_be_data_urls(
    http: httpx.Client, good: dict[str, str], files: list[Any], first: tuple[bytes, float]
) -> None:
    uploads = _voices(files, _converted(*CODECS[0]))
    urls = [base64.b64encode(content).decode() for _, (_, content, kind) in uploads if kind.startswith("audio")]
    entries = [{"audio_url": f"data:application/octet-stream;base64,{url}"} for url in urls]
    images = [upload for upload in uploads if upload[1][2].startswith("image")]
    answer = http.post("/v1/videos/sync", data={**good, "audio_reference": json.dumps(entries)}, files=images)
    assert answer.content == first[0], answer.text[:300]


@pytest.mark.parametrize(("container", "codec", "rate"), CODECS)
@pytest.mark.parametrize("damage", ["cut", "another name", "no audio", "long"])
def test_damaged_voices_of_other_formats_are_refused(
    http: httpx.Client, good: dict[str, str], files: list[Any], container: str, codec: str, rate: int, damage: str
) -> None:
    if damage == "long":
        damaged = sound(container, codec, rate=rate, samples=np.zeros(601 * 16_000, np.float32))
    else:
        whole = _converted(container, codec, rate)(files[2][1][1])
        magic = {"flac": b"OggS", "ogg": b"fLaC", "ipod": b"RIFF"}[container]
        damaged = {
            "cut": whole[: len(whole) // 2],
            "another name": magic + whole[4:],
            "no audio": whole[:12] + bytes(20_000),
        }[damage]
    response = http.post("/v1/videos/sync", data=good, files=_voices(files, lambda _: damaged))
    assert response.status_code == 400, response.text
    message = response.json()["error"]["message"]
    assert "reference audio 1" in message and "Errno" not in message, message
    assert ("at most 600 s" in message) == (damage == "long"), message


@pytest.mark.parametrize(
    ("damaged", "part"),
    [
        (flac(2**36 - 1), "at most 600 s"),
        (ogg(96_000, opus(255)), "255 channels"),
        (mp4(run=2**30), "1073741834 packets"),
        (mp4(times=(5000, 1024), sizes=(10, 5000), per_chunk=5000, edits=5000), "25000000 packets"),
        (wav(0xFFFFFFFF, channels=0xFFFF), "65535 channels"),
    ],
    ids=["samples", "channels", "fragment", "edits", "unknown length"],
)
def test_numbers_of_a_header_take_no_memory(
    server: ApiServer, http: httpx.Client, good: dict[str, str], files: list[Any], damaged: bytes, part: str
) -> None:
    before = server.memory()
    response = http.post("/v1/videos/sync", data=good, files=_voices(files, lambda _: damaged))
    assert response.status_code == 400, response.text
    assert part in response.json()["error"]["message"], response.text
    assert server.memory() < before + 50e6


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"prompt": "  "}, ("[input_missing]", "prompt")),
        ({"height": "100"}, ("[input_size] height is 100", "96 or 128")),
        ({"num_frames": "7"}, ("[input_value] num_frames is 7", "121")),
        ({"fps": "30"}, ("[input_value]", "24")),
        ({"seed": "-1"}, ("[input_value] seed is -1",)),
        ({"num_outputs_per_prompt": "11"}, ("num_outputs_per_prompt is 11", "1 video")),
        ({"num_inference_steps": "0"}, ("num_inference_steps",)),
        ({"guidance_scale": "nan"}, ("guidance_scale",)),
        ({"size": "0x0"}, ("0x0",)),
        ({"extra_params": '{"vidio_cfg_scale": 2}'}, ("[input_value]", "video_cfg_scale")),
        ({"extra_params": '{"shift": "much"}'}, ("[input_type]", "shift", "much")),
        ({"extra_params": '{"video_codec_options": {"preset": "best"}}'}, ("[input_value]", "video_codec_options")),
        ({"lora": '{"name": "any", "path": "/nowhere"}'}, ("no folder of LoRA files", "--lora-root")),
        ({"extra_params": "{"}, ("JSON",)),
        ({"extra_params": "[" * 100_000}, ()),
        ({"model": "another"}, ("another",)),
        ({"enable_frame_interpolation": "true"}, ("[input_value]", "enable_frame_interpolation")),
        ({"generate_sound": "false"}, ("[input_value]", "generate_sound")),
    ],
)
def test_a_bad_field_is_refused_with_its_reason(
    http: httpx.Client, good: dict[str, str], files: list[Any], change: dict[str, str], names: tuple[str, ...]
) -> None:
    response = http.post("/v1/videos/sync", data={**good, **change}, files=files)
    assert response.status_code == 400, response.text
    message = response.json()["error"]["message"]
    assert all(name in message for name in names), message


@pytest.mark.parametrize(
    ("take", "names"),
    [
        ([], ("[input_missing]", "image")),
        ([0, 1], ("[input_missing]", "audio")),
        ([0, 2, 3], ("[input_count]", "2")),
        ([0, 1, 2, "short"], ("[input_too_short]", "reference audio 2")),
        ([0, 1, 2, "junk"], ("[input_unreadable]", "reference audio 2")),
        ([0, "broken", 2, 3], ()),
        ([0, 1, 2, 3, "video"], ("reference audio 3",)),
    ],
)
def test_bad_references_are_refused_with_their_reason(
    http: httpx.Client, good: dict[str, str], files: list[Any], take: list[Any], names: tuple[str, ...]
) -> None:
    speech = files[3][1][1]
    odd = {
        "short": ("s.wav", speech[: 44 + 16_000], "audio/wav"),
        "junk": ("j.wav", b"RIFF without samples", "audio/wav"),
        "broken": ("b.png", files[1][1][1][:100], "image/png"),
        "video": ("v.mp4", b"any", "video/mp4"),
    }
    uploads = [files[which] if isinstance(which, int) else ("input_references", odd[which]) for which in take]
    response = http.post("/v1/videos/sync", data=good, files=uploads)
    assert response.status_code == 400, response.text
    message = response.json()["error"]["message"]
    assert all(name in message for name in names), message


def test_a_job_that_cannot_be_served_fails_with_the_same_reason(
    http: httpx.Client, good: dict[str, str], files: list[Any]
) -> None:
    job = http.post("/v1/videos", data={**good, "width": "50"}, files=files).json()["id"]
    state = _finished(http, job)
    assert (state["status"], state["error"]["code"]) == ("failed", 400)
    assert state["error"]["message"].startswith("[input_size] width is 50")
    assert http.get(f"/v1/videos/{job}").status_code == 400
    assert http.get(f"/v1/videos/{job}/content").status_code == 422
    assert http.delete(f"/v1/videos/{job}").json()["deleted"]
    assert http.get(f"/v1/videos/{job}").status_code == 404


def test_an_unknown_job_is_404(http: httpx.Client) -> None:
    for method, path in (("GET", "none"), ("GET", "none/content"), ("DELETE", "none")):
        assert http.request(method, f"/v1/videos/{path}").status_code == 404


def test_a_deleted_job_stops_and_is_gone(
    server: ApiServer,
    http: httpx.Client,
    load_test: ModuleType,
    good: dict[str, str],
    files: list[Any],
    first: tuple[bytes, float],
) -> None:
    before = _cpu(server)
    job = http.post("/v1/videos", data=load_test.LONG, files=files).json()["id"]
    wait_until(lambda: http.get(f"/v1/videos/{job}").json()["status"] != "queued", LIMIT, pause=0.1)
    assert http.get(f"/v1/videos/{job}").json()["progress"] < 100
    assert http.get(f"/v1/videos/{job}/content").status_code == 404
    assert http.delete(f"/v1/videos/{job}").json() == {**DELETED, "id": job, "status": "cancelled"}
    assert http.get(f"/v1/videos/{job}").json()["status"] == "cancelled"
    assert http.get(f"/v1/videos/{job}/content").status_code == 404
    assert http.delete(f"/v1/videos/{job}").json() == {**DELETED, "id": job}
    assert http.get(f"/v1/videos/{job}").status_code == 404
    assert http.post("/v1/videos/sync", data=good, files=files).content == first[0]
    # 200 steps would cost as much as ten such requests.
    assert _cpu(server) - before < 4 * first[1]
    assert not (server.storage / job).exists()


def test_a_bad_request_is_refused_while_others_are_computed(
    http: httpx.Client, load_test: ModuleType, good: dict[str, str], files: list[Any]
) -> None:
    job = http.post("/v1/videos", data=load_test.LONG, files=files).json()["id"]
    wait_until(lambda: http.get(f"/v1/videos/{job}").json()["status"] != "queued", LIMIT, pause=0.1)
    response = http.post("/v1/videos/sync", data=good, files=files[:3])
    assert (response.status_code, http.get(f"/v1/videos/{job}").json()["status"]) == (400, "in_progress")
    assert "[input_count]" in response.json()["error"]["message"]
    http.delete(f"/v1/videos/{job}")


def test_a_client_that_hangs_up_stops_its_request(
    server: ApiServer,
    http: httpx.Client,
    load_test: ModuleType,
    good: dict[str, str],
    files: list[Any],
    first: tuple[bytes, float],
) -> None:
    before = _cpu(server)
    with pytest.raises(httpx.ReadTimeout):
        http.post("/v1/videos/sync", data=load_test.LONG, files=files, timeout=1.5)
    assert http.post("/v1/videos/sync", data=good, files=files).content == first[0]
    assert _cpu(server) - before < 4 * first[1]


def _example(command: str, server: ApiServer, folder: Path, height: int) -> subprocess.CompletedProcess[str]:
    """Run one of the example's clients on the references in ``folder``; it writes ``out.mp4`` there."""
    steps = {"height": height, "width": 96, "num_inference_steps": 1}
    if command == "curl":
        script = EXAMPLES / "dreamid_omni" / "run_curl_references_to_video.sh"
        line = ["sh", str(script), str(folder), "<sub1> says, <S>Hello.<E>", str(folder / "out.mp4")]
        line += [part for name, value in steps.items() for part in ("-F", f"{name}={value}")]
    else:
        line = [
            sys.executable,
            str(EXAMPLES / "dreamid_omni" / "client.py"),
            "--server",
            server.url,
            "-o",
            str(folder / "out.mp4"),
        ]
        line += ["--images", *(str(folder / f"{name}.png") for name in "ab")]
        line += ["--voices", *(str(folder / f"{name}.wav") for name in "ab")]
        line += [part for name, value in steps.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    return run_client(line, server, KEY)


@pytest.mark.parametrize("command", ["python", "curl"])
def test_the_examples_clients_print_why_there_is_no_video(
    server: ApiServer, files: list[Any], command: str, tmp_path: Path
) -> None:
    for _, (name, content, _) in files:
        (tmp_path / name).write_bytes(content)
    done = _example(command, server, tmp_path, height=100)
    assert done.returncode == 1
    assert "[input_size] height is 100" in done.stderr


def test_the_commands_of_the_page_work(server: ApiServer, http: httpx.Client, files: list[Any], tmp_path: Path) -> None:
    """In their order: some read what others wrote, and the last ones ask for one job."""
    picture, voice = files[0][1][1], files[2][1][1]
    Image.open(io.BytesIO(picture)).save(tmp_path / "ben.jpg")
    (tmp_path / "anna.png").write_bytes(picture)
    (tmp_path / "anna.wav").write_bytes(voice)
    (tmp_path / "ben.mp3").write_bytes(_converted("mp3", "libmp3lame", 16_000)(voice))
    job, small = "", {"height": 64, "width": 96, "num_inference_steps": 1}
    for words in client_commands("dreamid_omni"):
        done = run_written(words, "dreamid_omni", server, tmp_path, key=KEY, small=small, job=job)
        assert done.returncode == 0, (words, done.stdout, done.stderr)
        if words[0] == "curl" and not job:
            job = json.loads(done.stdout)["id"]
            assert _finished(http, job)["status"] == "completed"
    assert {path.name for path in tmp_path.glob("*.mp4")} == {"tiny.mp4", "curl.mp4", "dreamid_omni.mp4", "talk.mp4"}
    assert measure_mp4(tmp_path / "talk.mp4").frames == 121
    assert http.get(f"/v1/videos/{job}").status_code == 404, "the last command deletes it"


def test_the_workflow_of_comfyui_makes_a_video(http: httpx.Client, files: list[Any], tmp_path: Path) -> None:
    for _, (name, content, _) in files:
        (tmp_path / name).write_bytes(content)
    small = {"width": 96, "height": 64, "num_inference_steps": 1}
    workflow = EXAMPLES / "dreamid_omni" / "comfyui_references_to_video.json"
    (tmp_path / "out.mp4").write_bytes(comfyui.run(workflow, tmp_path, http, **small))
    assert measure_mp4(tmp_path / "out.mp4").frames == 121


@pytest.mark.slow
def test_the_benchmark_of_the_page_measures_a_server(files: list[Any], tmp_path: Path) -> None:
    for _, (name, content, _) in files:
        (tmp_path / name).write_bytes(content)
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as web:
        Thread(target=web.serve_forever, daemon=True).start()
        host = f"127.0.0.1:{web.server_port}"
        with serving("dreamid_omni", tmp_path, "--reference-host", host) as server:
            words = benchmark_command("dreamid_omni", tmp_path / "tiny", server)
            done = run_client([word.replace("127.0.0.1:8001", host) for word in words], server)
        web.shutdown()
    assert done.returncode == 0, done.stderr
    assert re.search(r"Successful requests: +2\b", done.stdout), done.stdout


def test_an_expired_file_is_removed_and_its_job_remains(server: ApiServer, http: httpx.Client, forgotten: str) -> None:
    expires = http.get(f"/v1/videos/{forgotten}").json()["expires_at"]
    wait_until(lambda: not (server.storage / forgotten).exists(), expires - time.time() + 300, pause=0.5)
    assert http.get(f"/v1/videos/{forgotten}/content").status_code == 404
    assert http.get(f"/v1/videos/{forgotten}").json()["status"] == "completed"
    assert http.delete(f"/v1/videos/{forgotten}").json()["deleted"]


async def _run_load_test(load_test: ModuleType, server: ApiServer, requests: int, rounds: int) -> dict[str, Any]:
    report = await load_test.run(server.url, requests, rounds, 1, server.memory)
    return {**report, "alive": server.is_alive(), "files_left": len(list(server.storage.iterdir()))}


@pytest.mark.slow
def test_many_clients_at_once_are_served_refused_or_cancelled(server: ApiServer, load_test: ModuleType) -> None:
    report = asyncio.run(_run_load_test(load_test, server, requests=50, rounds=4))
    assert load_test.is_right(report), report
    assert report["resident_mb"][-1] < report["resident_mb"][1] + 100
