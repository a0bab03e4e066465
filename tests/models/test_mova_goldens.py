"""MOVA against recorded outputs of the original: components, positions, and forward calls of its towers and bridge.

The archive has two of the three layers of the recorded video tower. They include all that the bridge and the audio
tower read, so the recorded audio is complete, and the video is compared up to its second layer.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from port_kit.models.mova.parity import cases
from port_kit.models.mova.parity.goldens import Goldens
from port_kit.models.mova.parity.transformer_cases import build_denoisers, run_forward
from port_kit.parity import run_case
from port_kit.runtime.single_process import single_rank
from tests.helpers import raises

COMPONENTS = ("scheduler fp32", "audio_vae fp32", "audio_vae bf16")
FORWARDS = ("high_first_frame", "high_no_first_frame", "one_frame")
CASES = (
    *COMPONENTS,
    "transformer/rope fp32",
    *(f"transformer/{name} {word}" for name in FORWARDS for word in ("fp32", "bf16")),
)


@pytest.fixture(scope="module")
def recorded(mova_goldens: Path) -> Goldens:
    return Goldens.open(mova_goldens)


def test_every_recorded_case_is_listed(mova_goldens: Path) -> None:
    assert [case.name for case in cases(mova_goldens)] == list(CASES)


@pytest.mark.parametrize("name", CASES)
def test_a_case_is_within_its_bounds(name: str, mova_goldens: Path) -> None:
    (case,) = [case for case in cases(mova_goldens) if case.name == name]
    report = run_case(case)
    assert report.ok, (report.first_divergence, report.to_json())
    assert report.differences


def test_values_of_both_towers_and_the_bridge_are_compared(recorded: Goldens) -> None:
    names = [pair.name for pair in run_forward(recorded, "high_first_frame", "fp32")]
    assert names[-1] == "audio"
    for name in ("video.time_projection", "audio.patch_embedding", "bridge.a2v.1.inner.attn", "bridge.v2a.0"):
        assert name in names
    assert {"video.blocks.1", "audio.blocks.1", "bridge.1.video_out", "audio.head"} <= set(names)


@pytest.mark.parametrize(
    ("module", "first"),
    [
        ("bridge.layers.1.video_to_audio.kv", "bridge.v2a.1.inner.v"),
        ("audio.blocks.0.ffn.down", "audio.blocks.0"),
        ("video.blocks.0.self_attn.qkv", "video.blocks.0"),
    ],
)
def test_a_divergence_is_named(module: str, first: str, recorded: Goldens, monkeypatch: pytest.MonkeyPatch) -> None:
    from port_kit.models.mova.parity import transformer_cases

    def damaged(*args: object, **options: object) -> torch.nn.ModuleDict:
        parts = build_denoisers(*args, **options)  # type: ignore[arg-type]
        parts.get_submodule(module).weight.data[0] += 1.0
        parts.get_submodule(module).weight.data[-1] += 1.0
        return parts

    monkeypatch.setattr(transformer_cases, "build_denoisers", damaged)
    wrong = [
        pair.name
        for pair in run_forward(recorded, "high_first_frame", "fp32")
        if (pair.actual - pair.expected).abs().max() > 5e-5
    ]
    assert first in wrong and "audio" in wrong


def test_positions_of_the_bridge_depend_on_the_frame_rate(recorded: Goldens) -> None:
    meta = recorded.json("transformer/high_first_frame/inputs.json")
    inputs = recorded.tensors("transformer/high_first_frame/inputs")
    with single_rank(torch.float32), torch.inference_mode():
        parts = build_denoisers(recorded, meta, text_length=inputs["context"].shape[1])
        arguments = inputs["visual_latents"], inputs["audio_latents"].transpose(1, 2), inputs["timestep"]
        given = (*arguments, inputs["context"], inputs["context"])
        one, other = (parts["video"](*given, fps=fps)[1] for fps in (24.0, 12.0))
    assert (one - other).abs().max() > 1e-2


def test_a_folder_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with raises("goldens_invalid", "0 checkpoints"):
        list(cases(tmp_path))
