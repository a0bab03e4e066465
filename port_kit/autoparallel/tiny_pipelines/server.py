"""Hosted pipelines behind vLLM-Omni's server: ``port-kit run DIR --serve`` on a loopback port, and its endpoints."""

from __future__ import annotations

import base64
import io
import json
import shlex
import sys
import tempfile
import wave
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

from port_kit.autoparallel.tiny_pipelines.case import TinyPipeline
from port_kit.pipeline.media import measure_mp4
from port_kit.testing.server import ApiServer

#: Endpoint by output and by input of an image.
ENDPOINTS = {
    ("image", False): "/v1/images/generations",
    ("image", True): "/v1/images/edits",
    ("video", False): "/v1/videos/sync",
    ("video", True): "/v1/videos/sync",
    ("audio", False): "/v1/audio/generate",
}
#: Sampling parameters that are fields of the endpoints; others keep the defaults of the pipeline.
_FIELDS = ("num_frames", "num_inference_steps", "guidance_scale", "true_cfg_scale", "strength")
#: Seconds of a request.
_LIMIT = 300.0


def run_server(model: Path, *options: str, folder: Path, start_timeout: float = 400.0) -> ApiServer:
    """Return the server of ``port-kit run``, not started.

    Args:
        model: directory of a pipeline of diffusers.
        options: options of ``port-kit run``.
        folder: gets the script that starts it, and its log.
        start_timeout: seconds until it must answer.
    """
    script = folder / "serve.sh"
    script.write_text(f'exec {shlex.quote(sys.executable)} -m port_kit run --serve "$@"\n', encoding="utf-8")
    variables = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    arguments = ("--dtype", "float32", "--enforce-eager", *options)
    return ApiServer(
        model, *arguments, folder=folder, environment=variables, script=script, start_timeout=start_timeout
    )


def ask(url: str, case: TinyPipeline, output: str) -> httpx.Response:
    """Send the request of a tiny pipeline to the endpoint of its modality; return the answer.

    Args:
        url: address of the server.
        case: the pipeline.
        output: ``image``, ``video`` or ``audio``.
    """
    prompt, sampling = case.request()
    fields = {name: sampling[name] for name in ("seed", *_FIELDS) if name in sampling}
    if "negative_prompt" in prompt:
        fields["negative_prompt"] = prompt["negative_prompt"]
    if "width" in sampling:
        fields["size"] = f"{sampling['width']}x{sampling['height']}"
    image = case.media.get("image")
    endpoint = ENDPOINTS[output, image is not None]
    fields["input" if output == "audio" else "prompt"] = prompt["prompt"]
    if endpoint in ("/v1/images/generations", "/v1/audio/generate"):
        return httpx.post(url + endpoint, json=fields, timeout=_LIMIT)
    field = "image" if output == "image" else "input_reference"
    files = None if image is None else {field: ("image.png", _png(image), "image/png")}
    form = {key: str(value) for key, value in fields.items()}
    return httpx.post(url + endpoint, data=form, files=files, timeout=_LIMIT)


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def decode(response: httpx.Response, output: str) -> str:
    """Decode the file of an answer completely, and describe it.

    Raises:
        AssertionError: the status is not 200, or the file is constant or silent.
    """
    assert response.status_code == 200, response.text[:2000]
    decoders: Mapping[str, Callable[[httpx.Response], str]] = {"image": _image, "video": _video, "audio": _audio}
    return decoders[output](response)


def _image(response: httpx.Response) -> str:
    data: list[dict[str, Any]] = json.loads(response.content)["data"]
    image = Image.open(io.BytesIO(base64.b64decode(data[0]["b64_json"])))
    assert np.asarray(image).std() > 1
    return f"{image.format} {image.width}x{image.height}"


def _video(response: httpx.Response) -> str:
    with tempfile.TemporaryDirectory(prefix="port-kit-") as folder:
        path = Path(folder) / "video.mp4"
        path.write_bytes(response.content)
        found = measure_mp4(path)
    assert found.frames > 1
    return f"MP4 {found.width}x{found.height}, {found.frames} frames"


def _audio(response: httpx.Response) -> str:
    with wave.open(io.BytesIO(response.content)) as file:
        samples = np.frombuffer(file.readframes(file.getnframes()), "<i2")
        description = f"WAV, {file.getnchannels()} channels, {file.getnframes()} samples at {file.getframerate()} Hz"
    assert samples.std() > 1
    return description
