"""Images that are large in memory, slow to decode or damaged, on a server of Ovi."""

from __future__ import annotations

import io
import time

import httpx
from PIL import Image

from port_kit.references import MAX_PIXELS, MAX_SCANS
from tests.serving.hostile import MAX_QUEUE, Target, png, refused

#: Pixels a side of the largest square image, and its bytes in the memory of Pillow.
SIDE = int(MAX_PIXELS**0.5)
DECODED = SIDE * SIDE * 4


def test_images_of_waiting_requests_are_not_decoded(target: Target) -> None:
    """An image may be decoded as it arrives, and one for the engine; the others are files of some kilobytes."""
    large = {"input_reference": png(SIDE, SIDE)}
    assert target.sync(files=large).status_code == 200
    jobs = [target.submit({"num_inference_steps": "200"})]
    before = target.server.memory()
    jobs += [target.submit(files=large) for _ in range(MAX_QUEUE - 2)]
    refused(target.sync({"extra_params": '{"shift": 1e9}'}), "shift")  # requests are prepared in their order
    grown = target.server.memory() - before
    assert grown < 2.5 * DECODED, f"{MAX_QUEUE - 2} images of {DECODED} bytes take {grown}"
    for job in jobs:
        assert target.alice.delete(f"/v1/videos/{job}").status_code == 200


def test_an_image_with_many_scans_is_refused_at_once(target: Target) -> None:
    """Each of the 20,000 scans would take 30 ms."""
    buffer = io.BytesIO()
    Image.new("L", (SIDE, SIDE)).save(buffer, "JPEG", progressive=True)
    data = buffer.getvalue()
    scan = data[data.rfind(b"\xff\xc4", 0, data.rfind(b"\xff\xda")) : -2]
    started = time.monotonic()
    answer = target.sync(files={"input_reference": data[:-2] + scan * 20_000 + b"\xff\xd9"})
    refused(answer, "[input_size]", f"more than {MAX_SCANS} scans")
    assert time.monotonic() - started < 20


def test_a_damaged_image_is_refused_on_arrival(target: Target) -> None:
    buffer = io.BytesIO()
    Image.effect_noise((300, 200), 80).save(buffer, "PNG")
    cut = {"input_reference": buffer.getvalue()[:-1000]}
    answers: list[httpx.Response] = [
        target.sync(files=cut),
        target.alice.post("/v1/videos", data={"prompt": "x"}, files=cut),
    ]
    for answer in answers:
        refused(answer, "[input_unreadable] reference image 1")
