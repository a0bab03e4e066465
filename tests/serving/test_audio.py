"""The audio endpoint of the real server, on a generated port and two ranks, and the end of one of the ranks."""

from __future__ import annotations

import io
import json
import os
import signal
import threading
import time
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from port_kit.registry import find_port, list_ports
from port_kit.scaffold import NewPort, new_port
from port_kit.testing.server import ApiServer
from port_kit.testing.tiny_port import download_tiny
from tests.helpers import wait_until
from tests.serving.helpers import PATH, find_workers, run_client
from tests.serving.hostile import refused

LIMIT = 300.0
#: Seconds within which the documentation promises the end of the server; a busy machine needs longer.
PROMISED, BUSY = 30, 4
REQUEST = {"input": "rain", "num_inference_steps": 1, "audio_length": 0.5, "seed": 3}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ApiServer, Path]]:
    """A server of a new port whose output is audio at 16 kHz, on two ranks, and the folder of the port."""
    folder = tmp_path_factory.mktemp("audio")
    new_port(NewPort("rain_roof", "custom", folder / "port", output="audio"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PORT_KIT_PATH", str(folder / "port"))
        list_ports.cache_clear()
        model = download_tiny(find_port("rain_roof"), folder / "model").directory
        environment = {"OMP_NUM_THREADS": "1", "PATH": PATH}
        options = ["--dtype", "float32", "--enforce-eager", "--ulysses-degree", "2"]
        options += ["--storage", str(folder / "storage")]
        script = folder / "port" / "run_server.sh"
        with ApiServer(model, *options, folder=folder, environment=environment, script=script) as server:
            yield server, folder / "port"
    list_ports.cache_clear()


@pytest.fixture(scope="module")
def http(served: tuple[ApiServer, Path]) -> httpx.Client:
    return httpx.Client(base_url=served[0].url, timeout=LIMIT)


def generate(http: httpx.Client, **fields: Any) -> tuple[int, np.ndarray]:
    """Return the sample rate in Hz and the samples (S,)."""
    answer = http.post("/v1/audio/generate", json={**REQUEST, **fields})
    assert answer.status_code == 200, answer.text
    with wave.open(io.BytesIO(answer.content)) as file:
        assert file.getnchannels() == 1
        return file.getframerate(), np.frombuffer(file.readframes(file.getnframes()), dtype="<i2")


def test_the_file_has_the_rate_of_the_model_and_the_length_of_the_request(http: httpx.Client) -> None:
    rate, samples = generate(http)
    assert (rate, len(samples)) == (16_000, 8_000)
    assert len(generate(http, audio_length=1.0)[1]) == 16_000


def test_the_script_of_the_port_writes_a_file_or_the_reason(served: tuple[ApiServer, Path], tmp_path: Path) -> None:
    server, port = served
    line = ["sh", str(port / "run_curl_text_to_audio.sh"), 'rain on a "tin\\roof"', str(tmp_path / "rain.wav")]
    done = run_client([*line, '"audio_length": 0.5, "num_inference_steps": 1'], server)
    assert done.returncode == 0, done.stderr
    with wave.open(str(tmp_path / "rain.wav")) as file:
        assert (file.getframerate(), file.getnframes()) == (16_000, 8_000)
    done = run_client([*line[:-1], str(tmp_path / "none.wav"), '"audio_length": 31'], server)
    assert done.returncode == 1 and "at most 30 s" in done.stderr
    assert not (tmp_path / "none.wav").exists()


@pytest.mark.parametrize("fields", [{"guidance_scale": 1.0}, {"seed": 4}, {"negative_prompt": "wind"}])
def test_options_of_the_endpoint_have_an_effect(fields: dict[str, Any], http: httpx.Client) -> None:
    plain, again, other = (generate(http, **each)[1] for each in ({}, {}, fields))
    assert np.array_equal(plain, again)
    assert not np.array_equal(plain, other)


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"audio_lenght": 1.0}, "'audio_length'"),
        ({"audio_length": "\u0661"}, ""),
        ({"num_inference_steps": 10**6}, "num_inference_steps"),
        ({"guidance_scale": 1e30}, "guidance_scale"),
        ({"seed": -1}, "seed"),
        ({"input": "\ud800"}, "surrogates"),
    ],
)
def test_a_wrong_field_is_refused(http: httpx.Client, fields: dict[str, Any], part: str) -> None:
    body = json.dumps({**REQUEST, **fields})
    refused(http.post("/v1/audio/generate", content=body, headers={"content-type": "application/json"}), part)


def test_a_repeated_name_and_other_endpoints_are_refused(http: httpx.Client) -> None:
    headers = {"content-type": "application/json"}
    body = b'{"input": "rain", "input": "snow"}'
    refused(http.post("/v1/audio/generate", content=body, headers=headers), "'input' is repeated")
    refused(http.post("/v1/videos/sync", data={"prompt": "rain"}), "no endpoint", status=404)


def test_an_invalid_length_is_the_fault_of_the_client(http: httpx.Client) -> None:
    answer = http.post("/v1/audio/generate", json={**REQUEST, "audio_length": 31.0})
    assert answer.status_code == 400
    assert "at most 30 s" in answer.text


def test_a_dead_worker_ends_the_server(served: tuple[ApiServer, Path], http: httpx.Client) -> None:
    """Runs last: the server does not survive it."""
    server, _ = served
    answers: list[httpx.Response] = []
    long = {**REQUEST, "audio_length": 30.0, "num_inference_steps": 200}
    work = threading.Thread(target=lambda: answers.append(http.post("/v1/audio/generate", json=long)))
    work.start()
    time.sleep(2)
    os.kill(find_workers(server)[0].pid, signal.SIGKILL)
    started = time.monotonic()
    work.join(LIMIT)
    refused(answers[0], "engine", status=answers[0].status_code)
    assert answers[0].status_code in (500, 503)
    print(f"answered {time.monotonic() - started:.1f} s after the death of a worker")
    wait_until(lambda: not server.is_alive(), PROMISED * BUSY, pause=0.2)
    print(f"ended {time.monotonic() - started:.1f} s after the death of a worker")
    assert server.exit_code == 1
    assert "a worker of the engine has died; the server ends" in server.tail()
