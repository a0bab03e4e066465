"""HTML reports: complete, self-contained, escaped; the drawing of a layout; the contact sheet of a video."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from port_kit.cli import main
from port_kit.parallel.layout import Layout
from port_kit.reports import coverage_page, layout_svg, layout_text, parity_page
from port_kit.reports.parity import used
from tests.helpers import raises

VOID = {"meta", "br", "rect", "line", "link", "img"}
EVIL = '<script>alert("x")</script>&"\''


class Reader(HTMLParser):
    """Checks that tags close in order, and collects text, tags and attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def read(page: str) -> Reader:
    """Parse a page; require that it is complete and loads no other resource."""
    reader = Reader()
    reader.feed(page)
    assert reader.open == []
    names = {tag for tag, _ in reader.tags}
    assert not names & {"script", "link", "img", "iframe", "object"}
    links = [
        value or "" for _, attributes in reader.tags for key, value in attributes.items() if key in ("href", "src")
    ]
    assert all(link.startswith("#") for link in links)
    assert "url(" not in page and "@import" not in page
    assert "prefers-color-scheme: dark" in page
    return reader


def difference(name: str, max_abs: float, ok: bool = True) -> dict[str, Any]:
    """One compared tensor, allowed 1e-5."""
    bound = {"max_abs": 1e-5, "rel_l2": None, "why": "another order of summation"}
    return {"name": name, "max_abs": max_abs, "max_rel": 0.0, "rel_l2": max_abs, "bound": bound, "ok": ok}


def case(name: str, *differences: dict[str, Any]) -> dict[str, Any]:
    """One case."""
    ok = all(item["ok"] for item in differences)
    return {"case": name, "ok": ok, "max_abs": 1.0, "seconds": 0.5, "differences": list(differences)}


def parity_data(*cases: dict[str, Any]) -> dict[str, Any]:
    """Data of ``verify parity``."""
    return {"port": "p", "goldens": "G", "ok": all(item["ok"] for item in cases), "cases": list(cases)}


def test_a_failed_parity_names_the_tensor_and_the_last_that_agrees() -> None:
    first, second = difference("vid.block0", 1e-7), difference("vid.block1", 0.5, ok=False)
    page = parity_page(parity_data(case("umt5 fp32", difference("hidden", 0.0)), case("fusion/a fp32", first, second)))
    words = " ".join(read(page).words)
    assert "outside its bounds" in words and "1 of 2" in words
    assert "first tensor outside its bound: vid.block1" in " ".join(words.split())
    assert "last one that agrees: vid.block0" in " ".join(words.split())
    assert "look at the module between these two tensors" in words


def test_components_are_in_the_order_of_the_run() -> None:
    page = parity_page(
        parity_data(case("umt5 fp32", difference("h", 0.0)), case("fusion/a fp32", difference("x", 0.0)))
    )
    anchors = [attributes["id"] for tag, attributes in read(page).tags if tag == "h2" and "id" in attributes]
    assert anchors == ["umt5", "fusion"]


@pytest.mark.parametrize(
    ("max_abs", "share"),
    [(0.0, 0.0), (1e-6, 0.1), (1e-5, 1.0), (float("inf"), float("inf")), (float("nan"), float("inf"))],
)
def test_the_share_of_a_bound(max_abs: float, share: float) -> None:
    assert used(difference("x", max_abs)) == pytest.approx(share)
    read(parity_page(parity_data(case("c fp32", difference("x", max_abs, ok=share <= 1)))))


def test_the_page_of_parity_names_no_folder_of_the_user() -> None:
    data = parity_data(case("c fp32", difference("x", 0.0)))
    made = {"made_from": {"code": "hub"}, "code_version": "commit 0", "reused": True}
    data["reference"] = {**made, "model": "/home/me/m", "python": "/home/me/bin/python"}
    page = parity_page({**data, "goldens": "/home/me/goldens"})
    assert "/home" not in page
    assert {"m", "python", "against the goldens goldens"} <= set(read(page).words)


def test_names_are_escaped() -> None:
    data = parity_data(case(EVIL, difference(EVIL, 1.0, ok=False)))
    data["reference"] = {
        "made_from": {"code": EVIL, "content": EVIL},
        "code_version": EVIL,
        "model": EVIL,
        "python": EVIL,
        "reused": False,
        "seconds": 1.0,
    }
    page = parity_page({**data, "port": EVIL, "goldens": EVIL})
    assert EVIL in " ".join(read(page).words)


def test_coverage_of_a_port_is_a_page_with_templates_and_gaps(tmp_path: Path) -> None:
    source, target = tmp_path / "source.json", tmp_path / "target.json"
    layers = {f"layers.{i}.{leaf}.weight": [[4, 4], "float32"] for i in range(3) for leaf in "qk"}
    source.write_text(json.dumps({**layers, EVIL: [[2], "float32"]}))
    target.write_text(json.dumps({f"blocks.{i}.{leaf}.weight": [[4, 4], "float32"] for i in range(3) for leaf in "qk"}))
    rule = {"source": r"layers\.(\d+)\.(\w)\.weight", "target": r"blocks.\1.\2.weight"}
    rules = tmp_path / "rules.json"
    rules.write_text(json.dumps({"name": "r", "rule": [rule]}))
    page = tmp_path / "out" / "coverage.html"
    arguments = ["--source", str(source), "--target", str(target), "--rules", str(rules), "--html", str(page)]
    result = CliRunner().invoke(main, ["coverage", *arguments])
    assert (result.exit_code, page.is_file()) == (1, True), result.output
    words = " ".join(" ".join(read(page.read_text(encoding="utf-8")).words).split())
    assert "1 gap" in words and EVIL in words
    assert "layers.{0..2}.q.weight" in words.replace(" ", "") or "layers.{0-2}.q.weight" in words
    assert "hint:" in words


def test_coverage_of_several_components_has_one_section_each() -> None:
    report = {
        "ok": True,
        "rules": {"name": "r", "count": 1},
        "converted": False,
        "source": {"origin": "s", "tensors": 1, "bytes": 8, "used": 1},
        "target": {"origin": "t", "tensors": 1, "bytes": 8, "from": "recorded", "written": 1},
        "dropped": {"a": "not used"},
        "kept": {},
        "problems": [],
        "problem_count": 0,
        "lines": [{"source": ["a"], "target": ["b"], "how": "", "shape": "[2]", "rule": "r", "count": 1}],
    }
    reader = read(coverage_page("a port", {"transformer": report, "vae": report}))
    assert [attributes["id"] for tag, attributes in reader.tags if tag == "h2"] == ["transformer", "vae"]


LAYOUTS = ("single", "tp2", "ulysses2xring2", "tp2xulysses2xcfg2", "hsdp4", "hsdp2xcfg2", "allgather3")


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_is_drawn_with_every_rank(name: str) -> None:
    layout = Layout.parse(name)
    drawing = ET.fromstring(layout_svg(layout))
    words = [element.text for element in drawing.iter("{http://www.w3.org/2000/svg}text")]
    text = layout_text(layout)
    for rank in range(layout.world):
        assert f"rank {rank}" in words and f"rank {rank} " in text
    assert max(map(len, text.splitlines())) <= 110
    legend = next(word for word in words if word and word.startswith("one box: one rank"))
    assert all(f"{kind} {degree}" in legend for kind, degree in layout.degrees.items())
    assert ("one color" in legend) == (layout.sequence > 1)


def test_the_command_draws_and_writes(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["layout", "tp2xcfg2", "--svg", str(tmp_path / "a.svg"), "--json"])
    data = json.loads(result.stdout)["data"]
    assert data["world"] == 4 and data["parallel_config"] == {"tensor_parallel_size": 2, "cfg_parallel_size": 2}
    assert [(rank["tp"], rank["cfg"]) for rank in data["ranks"]] == [(0, 0), (1, 0), (0, 1), (1, 1)]
    ET.parse(tmp_path / "a.svg")
    wrong = CliRunner().invoke(main, ["layout", "tp2xtp2", "--json"])
    assert (wrong.exit_code, json.loads(wrong.stdout)["error"]["code"]) == (1, "parallel_degree")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An MP4 of 21 frames, from black to white, with audio that is silent and then loud."""
    import av
    import numpy as np

    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=12)
        video.width, video.height, video.pix_fmt = 96, 64, "yuv420p"
        audio = container.add_stream("aac", rate=16_000, layout="mono")
        for index in range(21):
            frame = av.VideoFrame.from_ndarray(np.full((64, 96, 3), 12 * index, np.uint8), format="rgb24")
            container.mux(video.encode(frame))
        time = np.arange(28_000) / 16_000
        wave = np.where(time < 0.9, 0.0, 0.8 * np.sin(2 * np.pi * 300 * time)).astype(np.float32)
        frame = av.AudioFrame.from_ndarray(wave[None], format="fltp", layout="mono")
        frame.sample_rate = 16_000
        container.mux(audio.encode(frame))
        for stream in (video, audio):
            container.mux(stream.encode(None))
    yield path


def test_the_contact_sheet_shows_frames_in_order_and_the_audio(clip: Path, tmp_path: Path) -> None:
    import numpy as np
    from PIL import Image

    from port_kit.reports.contact_sheet import GAP, LINE, MARGIN, THUMB, WAVE, draw_contact_sheet, read_clip

    found = read_clip(clip)
    assert (found.count, found.fps, found.rate, len(found.frames)) == (21, 12.0, 16_000, 8)
    assert [seconds for seconds, _ in found.frames] == sorted(seconds for seconds, _ in found.frames)
    image = np.asarray(Image.open(draw_contact_sheet(clip, tmp_path / "made" / "demo.png")).convert("RGB")).astype(int)
    tall, top = round(THUMB * 64 / 96), MARGIN + 2 * LINE
    centres = [
        image[top + row * (tall + LINE + GAP) + tall // 2, MARGIN + column * (THUMB + GAP) + THUMB // 2, 0]
        for row in range(2)
        for column in range(4)
    ]
    assert centres == sorted(centres) and centres[0] < 10 and centres[-1] > 225
    below = top + 2 * (tall + LINE + GAP)
    band = image[below + 25 : below + 70, MARGIN + 1 : -MARGIN - 1]
    drawn = (abs(band - (64, 108, 190)).sum(-1) < 20).any(0)
    share = 0.9 / found.seconds
    assert not drawn[: int(len(drawn) * (share - 0.05))].any()
    assert drawn[int(len(drawn) * (share + 0.05)) : int(len(drawn) * 0.9)].mean() > 0.9
    assert image.shape[0] == below + WAVE + 2 * LINE + MARGIN


@pytest.mark.parametrize(("peak", "is_red"), [(1.0, False), (1.5, True)])
def test_a_clipping_sound_is_named(peak: float, is_red: bool) -> None:
    import numpy as np

    from port_kit.reports.contact_sheet import Clip, draw_clip

    wave = np.array([0.0, peak, -peak, 0.5], np.float32).repeat(4000)
    frame = np.zeros((64, 96, 3), np.uint8)
    image = np.asarray(draw_clip(Clip([(0.0, frame)], 1, 12.0, wave, 16_000), "clip")).astype(int)
    assert (abs(image - (190, 48, 48)).sum(-1) < 20).any() == is_red


def test_a_file_that_is_no_clip_is_reported(tmp_path: Path) -> None:
    from port_kit.reports.contact_sheet import draw_contact_sheet

    (tmp_path / "clip.mp4").write_text("no")
    with raises("media_write", "clip.mp4"):
        draw_contact_sheet(tmp_path / "clip.mp4", tmp_path / "demo.png")
    assert not (tmp_path / "demo.png").exists()
