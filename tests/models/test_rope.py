"""Rotary embeddings against the original, and their properties."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from port_kit.models.wan.transformer.config import RopeConfig
from port_kit.models.wan.transformer.rope import RopeTables, reference_offset, rotate
from tests.helpers import raises

SCALING = 31 / 157
DREAMID = RopeConfig("dreamid_omni", SCALING, "bfloat16")
DREAMID_FP32 = RopeConfig("dreamid_omni", SCALING, "float32")
OVI = RopeConfig("ovi", 0.19676, "float64")


@pytest.mark.parametrize(
    ("config", "stream", "case"),
    [
        (DREAMID, "vid", "out"),
        (DREAMID, "audio", "out.bf16fs"),
        (DREAMID_FP32, "audio", "out.fp32fs"),
        (OVI, "vid", "out"),
        (OVI, "audio", "out"),
    ],
)
def test_rotation_is_the_originals(config: RopeConfig, stream: str, case: str, goldens: Path) -> None:
    meta = json.loads((goldens / "fusion/rope/rope.json").read_text())
    tensors = load_file(goldens / "fusion/rope/rope_fp32.safetensors")
    tables = RopeTables(config, meta["head_dim"])
    reads = config.family == "dreamid_omni"
    if stream == "vid":
        table = tables.video(tuple(meta["vid_grid"]), sum(meta["vid_ref"][0]) if reads else 0)
    else:
        table = tables.audio(meta["audio_grid"][0], meta["audio_ref"][0] if reads else ())
    given, expected = (tensors[f"{config.family}.{stream}.{name}"] for name in ("in", case))
    length = table.shape[1]
    torch.testing.assert_close(rotate(given[:, :length], table), expected[:, :length], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("config", "offset"), [(DREAMID, 760), (DREAMID_FP32, 759)])
def test_the_scalings_dtype_moves_the_references(config: RopeConfig, offset: int) -> None:
    assert reference_offset(config) == offset
    tables = RopeTables(config, 32)
    long = tables.audio(offset + 3)
    assert torch.equal(tables.audio(7, (3,))[:, 4:], long[:, offset:])


def test_audio_turns_the_leading_part_of_a_head_only() -> None:
    table = RopeTables(DREAMID, 128).audio(9)
    assert table.shape == (1, 9, 64, 2)
    assert torch.equal(table[:, :, 22:], torch.tensor([1.0, 0.0]).expand(1, 9, 42, 2))
    assert (table[:, 1:, :10, 1] != 0).all()


@pytest.mark.parametrize("head_dim", [16, 24, 32, 64, 96, 128])
def test_a_head_splits_as_the_original_does(head_dim: int) -> None:
    tables = RopeTables(DREAMID, head_dim)
    assert tables.parts == (head_dim - 4 * (head_dim // 6), 2 * (head_dim // 6), 2 * (head_dim // 6))
    assert tables.video((2, 3, 5), 1).shape == (1, 30, head_dim // 2, 2)


def test_rotation_keeps_length_dtype_and_the_first_token() -> None:
    table = RopeTables(OVI, 32).video((3, 2, 2))
    x: Tensor = torch.randn(2, 12, 4, 32)
    turned = rotate(x, table)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(turned[:, 0], x[:, 0])
    assert rotate(x.bfloat16(), table).dtype == torch.bfloat16


def test_tables_are_kept() -> None:
    tables = RopeTables(DREAMID, 32)
    assert tables.video((4, 2, 2), 1) is RopeTables(DREAMID, 32).video((4, 2, 2), 1)


def test_impossible_references_are_refused() -> None:
    with raises("reference_length", "3", "2"):
        RopeTables(DREAMID, 32).video((2, 2, 2), 3)
    with raises("reference_length", "4"):
        RopeTables(DREAMID, 32).audio(4, (3, 2))
    with raises("reference_length", "ovi"):
        RopeTables(OVI, 32).audio(4, (3,))


def test_an_impossible_scaling_is_refused() -> None:
    with raises("config_invalid", "freqs_scaling"):
        RopeConfig("ovi", 0.0, "float64")
    with raises("config_invalid", "other"):
        RopeConfig("other", 1.0, "float64")  # type: ignore[arg-type]
