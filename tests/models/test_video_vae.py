"""The video VAE beyond the goldens: precision, memory options, errors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from vllm_omni.diffusion.distributed.autoencoders.wan_vae_fastpath import REPORT_ATTR, WanVaeFastPathReport

from port_kit.models.wan.components.configs import VAE_CONFIG, vae_config
from port_kit.models.wan.components.video_vae import VideoVAE, build_video_vae
from port_kit.models.wan.parity.component_cases import load_video_vae
from port_kit.pipeline.precision import default_dtype
from tests.helpers import raises


@pytest.fixture(scope="module")
def vae(goldens: Path) -> VideoVAE:
    return load_video_vae(goldens, torch.float32)


def pixels(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_frames_and_pixels_of_latents(vae: VideoVAE) -> None:
    latents = vae.encode(pixels(1, 3, 5, 32, 48))
    assert latents.shape == (1, 48, 2, 2, 3)
    video = vae.decode(latents)
    assert video.shape == (1, 3, 5, 32, 48)
    assert video.dtype == torch.float32
    assert video.abs().max() <= 1.0


def test_weights_bear_the_rounding_of_the_engine_and_compute_in_float32(goldens: Path) -> None:
    exact, rounded = (load_video_vae(goldens, dtype) for dtype in (torch.float32, torch.bfloat16))
    for (name, a), b in zip(exact.named_parameters(), rounded.parameters(), strict=True):
        assert b.dtype == torch.float32
        assert torch.equal(b, a.bfloat16().float()), name


def test_precision_is_the_default_dtype_of_the_build() -> None:
    with torch.device("meta"), default_dtype(torch.bfloat16):
        built = build_video_vae(VAE_CONFIG)
    assert built.precision == torch.bfloat16
    assert {parameter.dtype for parameter in built.parameters()} == {torch.float32}


def test_slicing_has_no_effect_and_tiling_changes_seams_only(vae: VideoVAE) -> None:
    latents = vae.encode(pixels(2, 3, 1, 64, 64))
    whole = vae.decode(latents)
    vae.use_slicing = True
    torch.testing.assert_close(vae.decode(latents), whole, atol=1e-5, rtol=0)
    vae.use_slicing, vae.use_tiling = False, True
    vae.enable_tiling(32, 32, 16, 16)
    tiled = vae.decode(latents)
    vae.use_tiling = False
    assert tiled.shape == whole.shape
    assert not torch.equal(tiled, whole)


def test_a_decoder_in_float16_is_close_and_encodes_as_before(goldens: Path) -> None:
    vae = load_video_vae(goldens, torch.float32)
    clip = pixels(1, 3, 5, 32, 48)
    latents = vae.encode(clip)
    exact = vae.decode(latents)
    vae.decode_in_float16()
    video = vae.decode(latents)
    assert video.dtype == torch.float32
    assert 0 < (video - exact).norm() / exact.norm() < 5e-3
    assert torch.equal(vae.encode(clip), latents)


def test_the_fast_path_that_is_not_exact_decodes_in_float16(goldens: Path) -> None:
    latents = torch.zeros(1, 48, 1, 2, 2)
    for level, dtype in (("lossless", torch.float32), ("channels_last", torch.float16)):
        vae = load_video_vae(goldens, torch.float32)
        report = WanVaeFastPathReport(level=level, installed=True, channels_last=level == "channels_last")
        setattr(vae, REPORT_ATTR, report)
        vae.decode(latents)
        assert {parameter.dtype for parameter in vae.decoder.parameters()} == {dtype}, level


@pytest.mark.parametrize("shape", [(3, 1, 32, 32), (1, 4, 1, 32, 32), (1, 3, 4, 32, 32), (1, 3, 1, 32, 24)])
def test_pixels_of_another_shape_are_refused(vae: VideoVAE, shape: tuple[int, ...]) -> None:
    with raises("component_input"):
        vae.encode(torch.zeros(shape))


def test_latents_of_another_shape_are_refused(vae: VideoVAE) -> None:
    with raises("component_input", "(1, 16, 1, 2, 2)"):
        vae.decode(torch.zeros(1, 16, 1, 2, 2))


def test_a_configuration_without_statistics_is_refused() -> None:
    with raises("component_config", "z_dim"):
        build_video_vae({**VAE_CONFIG, "latents_mean": []})


def test_sizes_without_statistics_are_refused() -> None:
    with raises("goldens_invalid", "z_dim"):
        vae_config({"dim": 6, "z_dim": 16})
