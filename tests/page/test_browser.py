"""The page of Ovi in Chromium, on a real server with the tiny model: ``make test-page``."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from port_kit.page.form import page_fields
from port_kit.pipeline.media import measure_mp4
from port_kit.registry import find_port
from tests.page.browser import CLIP
from tests.page.conftest import KEY, Pages

pytestmark = pytest.mark.page

#: Milliseconds until a clip is shown.
CLIP_MS = CLIP * 1000
#: Reads whether a video has decoded picture and sound.
MEASURE = "v => ({duration: v.duration, width: v.videoWidth, sound: v.webkitAudioDecodedByteCount})"


def fill(page: Any, name: str, value: object) -> None:
    """Set a field of the page."""
    page.locator(f"#pk-{name} input, #pk-{name} textarea").first.fill(str(value))


def generate(page: Any, steps: int, seed: int = 7) -> None:
    """Request a clip."""
    fill(page, "num_inference_steps", steps)
    fill(page, "seed", seed)
    page.locator("#pk-generate").click()


def wait_for_seed(page: Any, seed: int) -> None:
    """Wait until the settings of a clip have a seed."""
    setting = page.locator("#pk-settings dl > div", has=page.locator("dt", has_text=re.compile("^seed$")))
    setting.locator("dd", has_text=re.compile(f"^{seed}$")).wait_for(timeout=CLIP_MS)


def test_the_page_has_the_fields_of_the_port(page: Any, pages: Pages) -> None:
    page.locator("#pk-options button").first.click()
    for field in page_fields(find_port("ovi")):
        part = page.locator(f"#pk-{field.name}")
        part.locator("input, textarea").first.wait_for(state="visible")
        if field.kind in ("int", "float"):
            assert field.range_text in part.inner_text(), field.name
            assert part.locator("input, textarea").input_value() == (
                "" if field.default is None else f"{field.default:g}"
            )
    assert "<S>One more song" in page.locator("#pk-prompt textarea").input_value()
    assert page.locator("#pk-server .pk-good").inner_text() == f"{pages.server} serves tiny"


def test_a_clip_is_made_with_progress_and_shown_with_sound(page: Any, tmp_path: Path) -> None:
    Image.new("RGB", (40, 120), (200, 80, 40)).save(tmp_path / "first.png")
    page.locator("#pk-image-0 input[type=file]").set_input_files(str(tmp_path / "first.png"))
    page.locator("#pk-image-0 img").wait_for()
    generate(page, 40, seed=11)
    page.locator("#pk-progress", has_text=re.compile(r"Step \d+ of 40\b.*so far")).wait_for(timeout=CLIP_MS)
    page.locator("#pk-progress", has_text="Done in").wait_for(timeout=CLIP_MS)
    video = page.locator("#pk-video video")
    video.evaluate("v => v.play()")
    page.wait_for_function("document.querySelector('#pk-video video').currentTime > 0.3")
    found = video.evaluate(MEASURE)
    assert found["duration"] == pytest.approx(121 / 24, abs=0.05) and found["width"] > 0 and found["sound"] > 0, found
    path = tmp_path / "clip.mp4"
    path.write_bytes(page.request.get(video.evaluate("v => v.currentSrc")).body())
    measured = measure_mp4(path)
    assert measured.frames == 121 and measured.sample_rate == 16_000 and measured.height > 2 * measured.width
    settings = page.locator("#pk-settings").inner_text()
    assert re.search(r"seed\s+11\b", settings) and re.search(r"steps\s+40\b", settings)
    page.locator("#pk-gallery", has_text="seed 11").wait_for()


def test_the_gallery_shows_an_earlier_clip_again(page: Any) -> None:
    for seed in (1, 2):
        generate(page, 1, seed=seed)
        wait_for_seed(page, seed)
    page.locator("#pk-gallery button", has_text="seed 1").click()
    wait_for_seed(page, 1)


def test_a_running_request_is_cancelled(page: Any, pages: Pages) -> None:
    generate(page, 200)
    page.locator("#pk-progress", has_text=re.compile(r"Step \d+ of 200")).wait_for(timeout=CLIP_MS)
    page.locator("#pk-cancel").click()
    page.locator("#pk-progress", has_text="Cancelled.").wait_for(timeout=60_000)
    assert page.locator("#pk-generate").is_enabled() and page.locator("#pk-cancel").is_disabled()
    assert [job["status"] for job in listed(pages)] == ["cancelled"]  # the clips before it were fetched and deleted


def listed(pages: Pages) -> list[dict[str, Any]]:
    """Return the jobs of the server."""
    answer = httpx.get(f"{pages.server}/v1/videos", headers={"Authorization": f"Bearer {KEY}"}, trust_env=False)
    found: list[dict[str, Any]] = answer.json()["data"]
    return found


def test_a_page_that_is_closed_leaves_no_job(chromium: Any, pages: Pages) -> None:
    page = chromium.new_page()
    page.goto(pages.own.url)
    page.locator("#pk-generate").wait_for()
    generate(page, 200)
    page.locator("#pk-progress", has_text=re.compile(r"Step \d+ of 200")).wait_for(timeout=CLIP_MS)
    page.close()
    deadline = time.monotonic() + 60
    while any(job["status"] in ("queued", "in_progress") for job in listed(pages)):
        assert time.monotonic() < deadline, "the job goes on"
        time.sleep(1)


def test_a_refusal_is_shown_at_its_field(page: Any) -> None:
    page.locator("#pk-options button").first.click()
    for name, value, message, right in (
        ("num_inference_steps", 300, "less than or equal to 200", 1),
        ("shift", 200, "[input_value] shift is 200; 0.01 or more and at most 100 is required", 1),
        ("prompt", " ", "[input_missing] prompt is missing or blank", "rain"),
    ):
        fill(page, name, value)
        page.locator("#pk-options button").first.click()  # closed: an error opens it
        page.locator("#pk-generate").click()
        error = page.locator(f"#pk-error-{name} .pk-error")
        error.wait_for(timeout=60_000)
        assert message in error.inner_text()
        assert page.locator(".pk-error").count() == 1
        fill(page, name, right)
        page.locator("#pk-options button").first.click()
    page.locator("#pk-generate").click()
    page.locator("#pk-progress", has_text="Done in").wait_for(timeout=CLIP_MS)
    assert page.locator(".pk-error").count() == 0


def test_a_server_that_is_down_is_reported(chromium: Any, pages: Pages) -> None:
    page, hosts = chromium.new_page(), set()
    page.on("request", lambda request: hosts.add(httpx.URL(request.url).host))
    page.goto(pages.lost.wait())
    page.locator("#pk-server .pk-error", has_text=f"no server answers at {pages.nowhere}").wait_for()
    page.locator("#pk-generate").click()
    page.locator("#pk-error-general .pk-error", has_text="port-kit serve MODEL").wait_for()
    page.close()
    assert hosts == {"127.0.0.1"}


def test_a_wrong_key_is_reported(chromium: Any, pages: Pages) -> None:
    page = chromium.new_page()
    page.goto(pages.wrong_key.wait())
    page.locator("#pk-server .pk-error", has_text="no valid API key").wait_for()
    page.close()


@pytest.mark.parametrize("name", ["dreamid_omni", "mova"])
def test_the_other_ports_have_pages(name: str, tmp_path: Path) -> None:
    from port_kit.page.build import Page
    from port_kit.page.client import JobClient

    port = find_port(name)
    blocks = Page(port, JobClient("http://127.0.0.1:1"), tmp_path).build()
    ids = {component.elem_id for component in blocks.blocks.values()}
    assert {f"pk-{field.name}" for field in page_fields(port)} | {"pk-prompt", "pk-image-0"} <= ids
    assert ("pk-audio-1" in ids) == ("audio" in port.references)
