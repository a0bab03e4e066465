"""Every kind of parallelism through ``Omni`` itself: two ranks give one rank's latents, each did its share, and a
layout that the model cannot have is refused before a worker starts. One script runs them all, in a process of its own.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from port_kit.testing.forkserver import run_forked
from tests.helpers import slow

SCRIPT = Path(__file__).with_name("run_layouts.py")
KINDS = ("tp2", "ulysses2")
#: Their communication is tested without an engine, too; cfg2 and ring2 with the engine on other models.
MORE_KINDS = ("cfg2", "ring2", "allgather2", "hsdp2")
REFUSED = ("ulysses3", "tp3", "cfg5", "cfg3+cache_dit")
#: Seconds for seven engines; machines are shared.
DEADLINE = 1800


@pytest.fixture(scope="module")
def traced_model(goldens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The goldens' tiny DreamID-Omni, served by a pipeline that reports the work of its ranks."""
    from port_kit.models.wan.parity.pipeline_cases import RunRecording, assemble

    recording = RunRecording.read(goldens / "e2e_dreamid")
    model = assemble(goldens, tmp_path_factory.mktemp("models") / "tiny", recording.record)
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").write_text(json.dumps({**index, "_class_name": "TracedDreamIDPipeline"}))
    return model


@pytest.fixture(scope="module")
def reports(request: pytest.FixtureRequest, traced_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the script filled, with the layouts of the selected tests."""
    folder = tmp_path_factory.mktemp("layouts")
    own = [item for item in request.session.items if item.path == request.path]
    kinds = [kind for kind in (*KINDS, *MORE_KINDS) if any(f"[{kind}]" in item.name for item in own)]
    command = [sys.executable, str(SCRIPT), str(traced_model), str(folder), "single", *REFUSED, *kinds]
    done = run_forked(command, timeout=DEADLINE, PORT_KIT_PATH=os.environ["PORT_KIT_PATH"])
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return folder


def outcome(reports: Path, layout: str) -> dict[str, Any]:
    """Return the result of a layout."""
    return json.loads((reports / f"{layout}.json").read_text())


def rank(reports: Path, layout: str, place: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """A rank's last latents and its figures."""
    path = reports / f"{layout}.{place}"
    return load_file(f"{path}.safetensors"), json.loads(Path(f"{path}.json").read_text())


@pytest.mark.parametrize("layout", [*KINDS, *slow(*MORE_KINDS)])
def test_two_ranks_give_the_latents_of_one(layout: str, reports: Path) -> None:
    assert "refused" not in outcome(reports, layout), outcome(reports, layout)
    expected, _ = rank(reports, "single", 0)
    for place in (0, 1):
        latents, _ = rank(reports, layout, place)
        for name, value in expected.items():
            torch.testing.assert_close(latents[name], value, rtol=0, atol=5e-6)
    alone, together = (np.load(reports / f"{name}.npz") for name in ("single", layout))
    assert np.abs(together["frames"] - alone["frames"]).max() <= 1  # of 255: a rounding may fall the other way
    assert np.abs(together["audio"] - alone["audio"]).max() <= 1e-4


@pytest.mark.parametrize("layout", [*KINDS, *slow(*MORE_KINDS)])
def test_each_rank_did_its_share(layout: str, reports: Path) -> None:
    _, alone = rank(reports, "single", 0)
    ranks = [rank(reports, layout, place)[1] for place in (0, 1)]
    attention = "transformer.blocks.0.video.self_attn.attn"
    sharded = layout in ("ulysses2", "ring2", "allgather2")
    for place, one in enumerate(ranks):
        expected = -(-alone["tokens"][attention] // 2) if sharded else alone["tokens"][attention]
        assert one["tokens"][attention] == expected
        assert one["calls"] == (alone["calls"] // 2 if layout == "cfg2" else alone["calls"])
        divided = layout in ("tp2", "hsdp2")
        assert (one["parameter_bytes"] <= 0.53 * alone["parameter_bytes"]) == divided
        group = {"cfg2": "cfg", "tp2": "tp"}.get(layout, "sequence")
        assert one["rank_coords"][group] == (place if layout != "hsdp2" else 0)
        assert sum(one["collectives"].values()) > 0


@pytest.mark.parametrize(
    ("layout", "code", "possible"),
    [
        ("ulysses3", "parallel_degree", "ulysses 2 or 4"),
        ("tp3", "parallel_degree", "tp 2 or 4"),
        ("cfg5", "parallel_degree", "cfg 2 or 4"),
        ("cfg3+cache_dit", "cache_passes", "cfg_parallel_size"),
    ],
)
def test_unsupported_options_are_refused_before_a_worker_starts(
    layout: str, code: str, possible: str, reports: Path
) -> None:
    refused = outcome(reports, layout)["refused"]
    assert f"[{code}]" in refused["text"] and f"hint: {refused['hint']}" in refused["text"]
    assert (refused["code"], refused["workers"]) == (code, 0)
    assert possible in refused["hint"]
    if code == "parallel_degree":
        assert refused["details"]["weight_bytes"]["tp2"] < refused["details"]["weight_bytes"]["cfg2"]
