"""Tiny pipelines of diffusers through ``Omni``: one rank against two, and against Cache-DiT; one behind the server.

``benchmarks/autoparallel_pipelines.py`` runs all of them.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from port_kit.autoparallel.shipped import SHIPPED
from port_kit.autoparallel.tiny_pipelines import CASES, write_pipeline
from port_kit.autoparallel.tiny_pipelines.server import ask, decode, run_server
from port_kit.testing.forkserver import run_forked

SCRIPT = Path(__file__).with_name("run_hosted.py")
#: Rows of a batch are computed by other kernels than the batch.
TOLERANCE = 2e-5
FLUX, WAN = "FluxTransformer2DModel.toml", "WanTransformer3DModel.toml"
#: The pipeline of the default run.
DEFAULT = "WanPipeline"
#: Messages of vLLM-Omni and bars of progress that a run must not show.
UNWANTED = ("no transformer with _sp_plan found", "it/s]")


def run(name: str, folder: Path, layouts: list[str], plan: str = "-") -> dict[str, dict[str, np.ndarray]]:
    """Return the media of each layout, from a process of its own."""
    write_pipeline(name, CASES[name], folder / "model")
    report = folder / "report.npz"
    command = [sys.executable, str(SCRIPT), name, str(folder / "model"), str(report), plan, *layouts]
    done = run_forked(command, timeout=900)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert not [text for text in UNWANTED if text in done.stdout + done.stderr]
    found: dict[str, dict[str, np.ndarray]] = {layout: {} for layout in layouts}
    with np.load(report) as arrays:
        for key, value in arrays.items():
            layout, _, medium = key.partition("/")
            found[layout][medium] = value
    return found


@pytest.mark.integration
@pytest.mark.parametrize(
    ("name", "plan", "layouts"),
    [
        (DEFAULT, WAN, ["cfg2"]),
        # the plan splits an embedder of guidance, which this configuration does not have
        pytest.param("FluxKontextPipeline", FLUX, ["cfg2", "ulysses2", "tp2"], marks=pytest.mark.slow),
        pytest.param("WanVideoToVideoPipeline", WAN, ["ulysses2"], marks=pytest.mark.slow),
        pytest.param("StableAudioPipeline", None, ["cfg2"], marks=pytest.mark.slow),
    ],
)
def test_two_ranks_equal_one(name: str, plan: str | None, layouts: list[str], tmp_path: Path) -> None:
    found = run(name, tmp_path, ["single", *layouts], str(SHIPPED / plan) if plan else "-")
    assert found["single"], "no media"
    for layout in layouts:
        assert found["single"].keys() == found[layout].keys()
        for medium, one in found["single"].items():
            assert one.std() > 0.01, f"{medium} is nearly constant"
            assert np.abs(found[layout][medium] - one).max() <= TOLERANCE * np.abs(one).max()


@pytest.mark.slow
@pytest.mark.integration
def test_an_image_is_edited_by_the_server(tmp_path: Path) -> None:
    name = "StableDiffusion3Img2ImgPipeline"
    model = write_pipeline(name, CASES[name], tmp_path / "model")
    with run_server(model, folder=tmp_path) as server:
        assert decode(ask(server.url, CASES[name], "image"), "image") == "PNG 32x32"


@pytest.mark.slow
@pytest.mark.integration
def test_cache_dit_reuses_at_a_large_threshold_only(tmp_path: Path) -> None:
    layouts = ["single", "cache_dit@0.0", "cache_ditxulysses2@0.0", "cache_dit@2.0"]
    found = run(DEFAULT, tmp_path, layouts, str(SHIPPED / WAN))
    ((medium, one),) = found["single"].items()
    bound = TOLERANCE * np.abs(one).max()
    assert np.array_equal(found["cache_dit@0.0"][medium], one)
    assert np.abs(found["cache_ditxulysses2@0.0"][medium] - one).max() <= bound
    assert np.abs(found["cache_dit@2.0"][medium] - one).max() > 100 * bound
