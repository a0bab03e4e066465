"""The commands of docs/port_a_pipeline.md, and the tests of every generated port."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import av
import pytest

from port_kit.autoparallel.plan import Plan
from port_kit.autoparallel.tiny_pipelines import CASES, write_pipeline
from port_kit.parallel.cached_layout import split_cache
from port_kit.scaffold import NewPort, new_port, port_files
from port_kit.scaffold.render import write_files
from port_kit.testing import GitRemote
from port_kit.testing.hub import Hub
from tests.inspect import fake_repositories
from tests.scaffold.helpers import LTX, ROOT, environment, run_pytest, write_ltx

GUIDE = ROOT / "docs" / "port_a_pipeline.md"
OWN = ("custom", "external", "bypass", "hybrid")
_BLOCK = re.compile(r"^```bash\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def script() -> str:
    """The guide's commands as one script that stops at the first failure."""
    lines = ["set -e", "TIMEFORMAT='# %R s, of the processors %U s and %S s'"]
    for block in _BLOCK.findall(GUIDE.read_text(encoding="utf-8")):
        lines += [f"echo '$ {line}' >&2\ntime {{ {line}; }}" for line in block.strip().splitlines()]
    return "\n".join(lines)


def follow(hub: Hub, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the commands of the guide in an empty folder."""
    done = subprocess.run(
        ["bash", "-c", script()],
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
    """Check the result of the guide."""
    assert "next: port-kit new ltx_video --from Lightricks/LTX-Video" in done.stdout
    width, height, frames = (LTX.sampling[name] for name in ("width", "height", "num_frames"))
    assert f"first.mp4: {frames} frames {width}x{height} at 25 fps" in done.stdout
    with av.open(str(folder / "first.mp4")) as video:
        assert sum(1 for _ in video.decode(video=0)) == frames
    recipe = (folder / "ltx_video" / "ltx_video" / "recipe.py").read_text(encoding="utf-8")
    assert re.search(r'revision="[0-9a-f]{40}"', recipe) and 'licence="tiny-licence' in recipe
    assert (folder / "model" / "model_index.json").exists()


@pytest.fixture(scope="module")
def ports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A port of every path."""
    folder = tmp_path_factory.mktemp("ports")
    write_ltx(folder / "source")
    # With one pytest for all, a folder must not be called like the package in it.
    hosted = NewPort("ltx_video", "diffusers", folder / "of_diffusers", source=str(folder / "source"))
    new_port(hosted, report=lambda _line: None)
    for path in OWN:
        write_own(f"{path}_one", path, folder / f"of_{path}")
    return folder


def write_own(name: str, path: str, target: Path) -> None:
    """Write a port of the skeleton, without the plan of git code."""
    write_files(target, port_files(NewPort(name, path, target)))  # type: ignore[arg-type]


def write_found(name: str, path: str, target: Path, source: Path) -> None:
    """Write a port of a model in a folder."""
    where = str(fake_repositories.write(sources()[path], source))
    code = GitRemote(source.with_name("code"), {"net/__init__.py": ""}).url if path == "external" else ""
    port = NewPort(name, path, target, source=where, code=code, repositories=("some-lab/some-net",))  # type: ignore[arg-type]
    write_files(target, port_files(port))


def sources() -> dict[str, fake_repositories.Files]:
    """Sources of the ports with custom code: shards of pickles, keys above tensors, a hybrid."""
    shards = {
        f"weights/net-0000{part}-of-00002.bin": fake_repositories.torch_file(
            fake_repositories.torch_tensors(f"blocks.{part}.weight")
        )
        for part in (1, 2)
    }
    wrapped = {
        "net [ema].pt": fake_repositories.torch_file(
            {"state": {"ema": fake_repositories.torch_tensors("blocks.0.weight")}}
        )
    }
    return {"custom": shards, "external": wrapped, "hybrid": fake_repositories.hybrid_model(), "bypass": wrapped}


@pytest.mark.parametrize("path", OWN)
@pytest.mark.parametrize("name", ["a" * 30, "zz"])
def test_names_do_not_break_lines(name: str, path: str, tmp_path: Path) -> None:
    write_own(name, path, tmp_path / "port")
    write_found(name, path, tmp_path / "found", tmp_path / "source")
    lint(tmp_path / "port", tmp_path / "found")


@pytest.mark.parametrize("path", ["custom", "external", "bypass"])
@pytest.mark.parametrize("output", ["audio", "image"])
def test_other_outputs_are_linted_and_formatted(output: str, path: str, tmp_path: Path) -> None:
    write_files(tmp_path / "port", port_files(NewPort("zz", path, tmp_path / "port", output=output)))  # type: ignore[arg-type]
    lint(tmp_path / "port")


def test_generated_ports_are_linted_and_formatted(ports: Path) -> None:
    lint(*(ports / f"of_{path}" for path in ("diffusers", *OWN)))


def lint(*folders: Path) -> None:
    """Lint folders with their own configuration; require that no change is left."""
    for arguments in (["check", "--no-cache"], ["format", "--diff", "--no-cache"]):
        command = [sys.executable, "-m", "ruff", *arguments, *map(str, folders)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr


@pytest.mark.slow
def test_every_path_passes_its_own_tests(ports: Path) -> None:
    """Ranks and caches here for diffusers alone: the others share one transformer, and git code has tests below."""
    tests = [f"{name}/tests" for name in ("of_diffusers", "of_custom", "of_bypass", "of_hybrid")]
    chosen = "of_diffusers or not (ranks_share or cache_saves)"
    assert "17 passed" in run_pytest(tests, "-m", "not engine", "-k", chosen, cwd=ports)


@pytest.mark.slow
def test_the_guide_with_every_check(ltx_hub: Hub, tmp_path: Path) -> None:
    done = follow(ltx_hub, tmp_path)
    check(done, tmp_path)
    plan = Plan.load(tmp_path / "ltx_video" / "ltx_video" / "plan.toml")
    layouts = {proof.layout for proof in plan.proofs if not split_cache(proof.layout)[0]}
    assert layouts and f"{len(layouts)} of {len(layouts)} layouts match one rank" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("path", OWN)
def test_a_skeleton_passes_all_of_its_tests(path: str, tmp_path: Path) -> None:
    new_port(NewPort("some_port", path, tmp_path / "port"), report=lambda _line: None)  # type: ignore[arg-type]
    run_pytest(["port/tests"], cwd=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("path", ["custom", "external"])
@pytest.mark.parametrize("output", ["audio", "image"])
def test_a_skeleton_of_another_output_passes_all_of_its_tests(output: str, path: str, tmp_path: Path) -> None:
    port = NewPort("some_port", path, tmp_path / "port", output=output)  # type: ignore[arg-type]
    new_port(port, report=lambda _line: None)
    run_pytest(["port/tests"], cwd=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("pipeline", "passed"), [("PixArtSigmaPipeline", 7), ("WanImageToVideoPipeline", 9)])
def test_a_port_of_another_pipeline(pipeline: str, passed: int, tmp_path: Path) -> None:
    """An image, and a video from an image with two transformers."""
    source = write_pipeline(pipeline, CASES[pipeline], tmp_path / "model")
    new_port(NewPort("some_port", "diffusers", tmp_path / "port", source=str(source)), report=lambda _line: None)
    assert f"{passed} passed" in run_pytest(["port/tests"], cwd=tmp_path)
