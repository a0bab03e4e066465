"""The commands of docs/port_a_model.md, which end with the worked port of a video."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import av
import pytest

from benchmarks.worked_ports import LEAST_KEPT, count_all
from port_kit.testing.server import free_port
from tests.examples.worked_ports import run_own_tests
from tests.scaffold.helpers import ROOT, environment

GUIDE = ROOT / "docs" / "port_a_model.md"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The result of the commands of the guide."""
    found = tmp_path_factory.mktemp("guide")
    (found / "examples").symlink_to(ROOT / "examples")
    blocks = re.findall(r"^```bash\n(.*?)^```$", GUIDE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    script = "set -e\ntrap 'kill $(jobs -p) 2>/dev/null || true' EXIT\n" + "".join(blocks)
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=found,
        env=environment(HF_HOME=str(found / "cache"), PORT=str(free_port())),
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
    )
    print(done.stdout, done.stderr)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-6000:]
    (found / "output.txt").write_text(done.stdout, encoding="utf-8")
    return found


@pytest.mark.slow
def test_the_guide_says_what_happens(folder: Path) -> None:
    output = (folder / "output.txt").read_text(encoding="utf-8")
    assert "FAIL first at stages.0.mixer" in output
    assert "3 of 3 cases within their bounds" in output
    assert "4 of 4 layouts match one rank and divide the work" in output
    assert "first.mp4: 3 frames 40x24 at 16 fps" in output
    for name in ("first.mp4", "cat.mp4"):
        with av.open(str(folder / name)) as video:
            assert sum(1 for _ in video.decode(video=0)) == 3


@pytest.mark.slow
def test_a_changed_weight_is_found_in_its_block(folder: Path) -> None:
    """The report names the first module that differs."""
    from safetensors.torch import load_file, save_file

    path = folder / "driftwood" / "model" / "transformer" / "model.safetensors"
    tensors = load_file(path)
    name = "module.stages.1.reader.fuse.weight"
    save_file({**tensors, name: tensors[name].roll(1, 0).contiguous()}, path)
    command = [sys.executable, "-m", "port_kit", "verify", "parity", "driftwood", "--goldens", "goldens", "--json"]
    done = subprocess.run(
        command,
        cwd=folder / "driftwood",
        env=environment(PORT_KIT_PATH=str(folder / "driftwood")),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    cases = {case["case"]: case for case in json.loads(done.stdout)["data"]["cases"]}
    assert cases["transformer fp32"]["first_divergence"] == "stages.1.reader"
    assert cases["projector fp32"]["ok"] and not cases["pipeline fp32"]["ok"]


def test_most_generated_lines_are_kept() -> None:
    """The table of the guide is that of the script."""
    page = GUIDE.read_text(encoding="utf-8")
    for kind, lines in count_all():
        assert lines.share >= LEAST_KEPT, (kind, lines)
        assert f"| {kind} | {lines.generated} | {lines.kept} | {lines.share:.0%} | {lines.written} |" in page


@pytest.mark.slow
def test_the_port_passes_all_of_its_tests(tmp_path: Path) -> None:
    assert "7 passed" in run_own_tests("video", folder=tmp_path)
