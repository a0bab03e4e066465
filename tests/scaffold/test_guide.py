"""docs/port_a_model.md, executed: its commands, in their order, in one shell, with a tiny model on a loopback Hub."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import av
import pytest

from port_kit.testing.hub import Hub
from tests.scaffold.conftest import LTX, ROOT, environment

GUIDE = ROOT / "docs" / "port_a_model.md"
_BLOCK = re.compile(r"^```bash *(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def script(*, long: bool) -> str:
    """The guide's commands as one script that stops at the first failure; ``fails`` blocks must fail."""
    lines = ["set -e", "TIMEFORMAT='# %R s, of the processors %U s and %S s'"]
    for kind, block in _BLOCK.findall(GUIDE.read_text(encoding="utf-8")):
        if kind == "fails":
            lines.append(f"! {block.strip()}")
        elif kind != "long" or long:
            lines += [f"echo '$ {line}' >&2\ntime {{ {line}; }}" for line in block.strip().splitlines()]
    return "\n".join(lines)


def follow(hub: Hub, folder: Path, *, long: bool) -> subprocess.CompletedProcess[str]:
    """Sit down in an empty folder and do what the guide says."""
    done = subprocess.run(
        ["bash", "-c", script(long=long)],
        cwd=folder,
        env=environment(HF_ENDPOINT=hub.endpoint, HF_HOME=str(folder / "cache")),
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-6000:]
    # pytest -s shows how long each command took
    print("", *(line for line in done.stderr.splitlines() if line.startswith(("$ ", "# "))), sep="\n")
    return done


def check(done: subprocess.CompletedProcess[str], folder: Path) -> None:
    """What a reader has at the end."""
    assert "next: port-kit new ltx_video --from Lightricks/LTX-Video" in done.stdout
    assert "MochiTransformer3DModel cannot be adapted" in done.stderr
    width, height, frames = (LTX.request[name] for name in ("width", "height", "num_frames"))
    assert f"first.mp4: {frames} frames {width}x{height} at 25 fps" in done.stdout
    with av.open(str(folder / "first.mp4")) as video:
        assert sum(1 for _ in video.decode(video=0)) == frames
    recipe = (folder / "ltx_video" / "ltx_video" / "recipe.py").read_text(encoding="utf-8")
    assert re.search(r'revision="[0-9a-f]{40}"', recipe) and 'licence="tiny-licence' in recipe
    assert (folder / "model" / "model_index.json").exists()
    assert (folder / "my_model" / "original" / "my_model_original" / "model.py").exists()


def test_the_guide_leads_to_a_video(ltx_hub: Hub, tmp_path: Path) -> None:
    check(follow(ltx_hub, tmp_path, long=False), tmp_path)


@pytest.mark.slow
def test_the_guide_with_every_check(ltx_hub: Hub, tmp_path: Path) -> None:
    done = follow(ltx_hub, tmp_path, long=True)
    check(done, tmp_path)
    assert "2 of 2 cases within their bounds" in done.stdout
    assert "12 of 12 layouts compute what one rank computes" in done.stdout
