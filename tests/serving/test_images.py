"""The image endpoints of the real server, on a pipeline of diffusers without a port."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from port_kit.autoparallel.tiny_pipelines import CASES, write_pipeline
from port_kit.autoparallel.tiny_pipelines.server import decode, run_server
from port_kit.scaffold.render import render
from port_kit.testing.server import ApiServer
from tests.serving.helpers import run_client
from tests.serving.hostile import png, refused, small_png

GENERATE, EDIT = "/v1/images/generations", "/v1/images/edits"
LIMIT = 60.0
PIPELINE = "StableDiffusion3Img2ImgPipeline"
GOOD = {"prompt": "a red cat", "size": "32x32", "num_inference_steps": 2, "strength": 0.6, "seed": 3}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    folder = tmp_path_factory.mktemp("images")
    model = write_pipeline(PIPELINE, CASES[PIPELINE], folder / "model")
    with run_server(model, folder=folder) as running:
        yield running


@pytest.fixture(scope="module")
def http(server: ApiServer) -> httpx.Client:
    return httpx.Client(base_url=server.url, timeout=LIMIT)


def edit(http: httpx.Client, image: bytes, **fields: Any) -> httpx.Response:
    form = {name: str(value) for name, value in {**GOOD, **fields}.items()}
    return http.post(EDIT, data=form, files={"image": ("a.png", image, "image/png")})


def test_an_image_becomes_an_image(http: httpx.Client) -> None:
    first, again = edit(http, small_png()), edit(http, small_png())
    assert decode(first, "image") == "PNG 32x32"
    assert first.json()["data"] == again.json()["data"]


def test_the_script_of_a_port_writes_an_image(server: ApiServer, tmp_path: Path) -> None:
    (tmp_path / "image.png").write_bytes(small_png())
    line = [*script("image", tmp_path), str(tmp_path / "image.png"), 'a "red\\cat"', str(tmp_path / "out.png")]
    done = run_client([*line, "-F", "size=32x32", "-F", "num_inference_steps=2"], server)
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "out.png").size == (32, 32)


def test_the_script_of_a_port_prints_why_there_is_no_image(server: ApiServer, tmp_path: Path) -> None:
    line = [*script("text", tmp_path), 'a "red\\cat"', str(tmp_path / "out.png")]
    done = run_client([*line, '"seed": 3, "num_inference_steps": 100000'], server)
    assert done.returncode == 1 and "num_inference_steps" in done.stderr and '"code": 400' in done.stderr
    assert not (tmp_path / "out.png").exists()


def script(source: str, folder: Path) -> list[str]:
    """Write the script that ``port-kit new`` writes for images from ``image`` or ``text``; return its command."""
    path = folder / "run.sh"
    path.write_text(render(f"common/run_curl_{source}_to_image.sh", {"example_prompt": "a cat"}), encoding="utf-8")
    return ["sh", str(path)]


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"num_inference_stepz": 2}, ("unknown field", "'num_inference_steps'")),
        ({"generator_device": "cuda:7"}, ("unknown field",)),
        ({"num_inference_steps": 100_000}, ("num_inference_steps",)),
        ({"guidance_scale": 1e30}, ("guidance_scale",)),
        ({"n": 1000}, ("10",)),
        ({"size": "100000x100000"}, ()),
        ({"seed": "١"}, ()),
    ],
)
def test_a_wrong_field_is_refused_by_both_endpoints(
    http: httpx.Client, fields: dict[str, Any], parts: tuple[str, ...]
) -> None:
    plain = {name: value for name, value in GOOD.items() if name != "strength"}
    refused(http.post(GENERATE, json={**plain, **fields}), *parts)
    refused(edit(http, small_png(), **fields), *parts)


@pytest.mark.parametrize(
    ("body", "part"),
    [
        (b'{"prompt": "a", "prompt": "b"}', "'prompt' is repeated"),
        (b'{"prompt": "a", "guidance_scale": 1e999}', "out of range"),
        (b'{"prompt": "a", "seed": ' + b"9" * 400 + b"}", "400 digits"),
        (b'{"prompt": "\\ud800"}', "surrogates"),
        (b'{"prompt": [' + b"[]," * 20_000 + b"[]]}", "values"),
        (b"[" * 9_000, "recursion"),
        (b"[1]", "a JSON object is required"),
        (b"\xff", "no valid JSON"),
    ],
)
def test_a_body_that_is_no_plain_json_is_refused(http: httpx.Client, body: bytes, part: str) -> None:
    headers = {"content-type": "application/json"}
    refused(http.post(GENERATE, content=body, headers=headers), part)


def image(kind: str, *, frames: int = 1) -> bytes:
    """Return an image file; with several frames, an animation."""
    buffer = io.BytesIO()
    pictures = [Image.new("RGB", (8, 8), (80 * number, 0, 0)) for number in range(frames)]
    more: dict[str, Any] = {"save_all": True, "append_images": pictures[1:]} if frames > 1 else {}
    pictures[0].save(buffer, kind, **more)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (png(13_300, 13_300), ("[input_size]", "13300x13300")),
        (image("GIF", frames=3), ("is GIF", "PNG, JPEG, WEBP")),
        (image("BMP"), ("is BMP",)),
        (image("TIFF"), ("is TIF",)),
        (b"\0\0\0\x20ftypavif" + b"\0" * 40, ("is AVIF",)),
        (b"<svg/>", ("unknown format",)),
        (image("WEBP", frames=3).replace(b"\x07\0\0\x07\0\0", b"\xff\xff\xff\xff\xff\xff", 1), ("[input_size]",)),
    ],
    ids=["bomb", "gif", "bmp", "tiff", "avif", "svg", "animated webp"],
)
def test_an_image_is_refused_for_its_content(http: httpx.Client, content: bytes, parts: tuple[str, ...]) -> None:
    refused(edit(http, content), *parts)


@pytest.mark.parametrize("path", ["/etc/passwd", "/etc/none", "owner/name"])
def test_a_lora_needs_a_configured_folder(http: httpx.Client, path: str) -> None:
    lora = {"name": "x", "path": path}
    plain = {name: value for name, value in GOOD.items() if name != "strength"}
    refused(http.post(GENERATE, json={**plain, "lora": lora}), "no folder of LoRA files")
    refused(edit(http, small_png(), lora=json.dumps(lora)), "no folder of LoRA files")


@pytest.mark.parametrize("name", ["mask_image", "reference_image"])
def test_every_field_with_an_image_is_checked(http: httpx.Client, name: str) -> None:
    refused(edit(http, small_png(), **{name: "http://127.0.0.1/a.png"}), "references by URL are not allowed")
    url = f"data:image/png;base64,{base64.b64encode(png(13_300, 13_300)).decode()}"
    refused(edit(http, small_png(), **{name: url}), "[input_size]", "13300x13300")


def test_a_query_is_not_ignored(http: httpx.Client) -> None:
    refused(http.post(f"{GENERATE}?seed=3", json=GOOD), "'seed=3'")


def test_a_long_text_is_refused(http: httpx.Client) -> None:
    refused(http.post(GENERATE, json={"prompt": "a" * 100_000}), "prompt has 100000 characters")
    refused(http.post(GENERATE, json={"prompt": "a" * 2_000_000}), "more than 1 MB")


@pytest.mark.parametrize("url", ["http://127.0.0.1/a.png", "file:///etc/passwd", "data:image/png,x"])
def test_an_image_by_url_needs_an_allowed_host(http: httpx.Client, url: str) -> None:
    refused(http.post(EDIT, data={**GOOD, "url": url}))


def test_a_data_url_is_an_image(http: httpx.Client) -> None:
    url = f"data:image/png;base64,{base64.b64encode(small_png()).decode()}"
    answer = http.post(EDIT, data={**GOOD, "url": url})
    assert answer.status_code == 200, answer.text
    assert answer.json()["data"] == edit(http, small_png()).json()["data"]


def test_a_wrong_request_is_refused_on_arrival(http: httpx.Client) -> None:
    """The answer does not wait for the request that is computed."""
    answers: list[httpx.Response] = []
    work = threading.Thread(target=lambda: answers.append(edit(http, small_png(), num_inference_steps=300)))
    work.start()
    time.sleep(1)
    refused(edit(http, small_png(), guidance_scale=1e30), "guidance_scale")
    assert not answers
    work.join(LIMIT)
    assert answers[0].status_code == 200
