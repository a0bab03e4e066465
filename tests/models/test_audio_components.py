"""Mel front end, audio VAE and vocoder beyond the goldens: other sizes, edges, precision, errors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from port_kit.models.wan.components.audio_vae import build_audio_vae
from port_kit.models.wan.components.configs import VOCODER_CONFIG, vocoder_config
from port_kit.models.wan.components.mel import SAMPLE_RATE, LogMel, mel_bands
from port_kit.models.wan.components.vocoder import FILTER_TAPS, SnakeBeta, build_vocoder
from port_kit.models.wan.parity.component_cases import load_audio_vae, load_vocoder
from tests.helpers import raises


def tone(hertz: float, samples: int = 16_000) -> torch.Tensor:
    """A sine of amplitude 1/2, ``[1, samples]`` at 16 kHz."""
    return 0.5 * torch.sin(2 * torch.pi * hertz * torch.arange(samples) / SAMPLE_RATE)[None]


@pytest.mark.parametrize("hertz", [200.0, 1000.0, 3500.0, 7000.0])
def test_a_tone_is_loudest_in_its_band(hertz: float) -> None:
    bands = mel_bands(80)
    mel = LogMel(80)(tone(hertz)).mean(dim=2)[0]
    assert mel.argmax() == bands[:, round(hertz / SAMPLE_RATE * 1024)].argmax()


def test_bands_cover_the_spectrum_with_unit_area() -> None:
    bands = mel_bands(80)
    assert bands.shape == (80, 513)
    hertz_per_bin = SAMPLE_RATE / 1024
    torch.testing.assert_close(bands[40:].sum(dim=1) * hertz_per_bin, torch.ones(40), atol=0.05, rtol=0)
    assert torch.all(bands[:, 4:511].sum(dim=0) > 0)


@pytest.mark.parametrize(("samples", "frames"), [(385, 1), (512, 2), (16_000, 62), (80_384, 314)])
def test_mel_frames_and_latents_of_a_length(samples: int, frames: int) -> None:
    assert LogMel(80)(torch.zeros(1, samples)).shape == (1, 80, frames)


def test_samples_beyond_full_scale_are_clipped() -> None:
    mel = LogMel(80)
    loud = torch.sign(tone(440.0))
    assert torch.equal(mel(3 * loud), mel(loud))


@pytest.mark.parametrize("shape", [(16_000,), (1, 1, 16_000), (1, 384)])
def test_a_wave_that_cannot_be_framed_is_refused(shape: tuple[int, ...]) -> None:
    with raises("component_input"):
        LogMel(80)(torch.zeros(shape))


def test_audio_vae_of_other_sizes() -> None:
    vae = build_audio_vae({"data_dim": 24, "embed_dim": 6, "hidden_dim": 8})
    _fill(vae)
    latents = vae.encode(tone(300.0, 6_000))
    assert latents.shape == (1, 6, 6_000 // 512)
    assert vae.decode(latents).shape == (1, 24, 2 * latents.shape[2])


def test_a_batch_is_its_samples(goldens: Path) -> None:
    vae, vocoder = load_audio_vae(goldens, torch.float32), load_vocoder(goldens, torch.float32)
    waves = torch.cat([tone(300.0, 4_096), tone(900.0, 4_096)])
    together, alone = vae.encode(waves), torch.cat([vae.encode(wave[None]) for wave in waves])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    mel = vae.decode(together)
    torch.testing.assert_close(vocoder(mel), torch.cat([vocoder(one[None]) for one in mel]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("rates", [(4, 2), (5, 3, 2)])
def test_vocoder_of_other_sizes(rates: tuple[int, ...]) -> None:
    config = {
        **VOCODER_CONFIG,
        "num_mels": 10,
        "upsample_initial_channel": 16,
        "upsample_rates": list(rates),
        "upsample_kernel_sizes": [rate + 2 * (rate // 2) for rate in rates],
        "resblock_kernel_sizes": [3],
        "resblock_dilation_sizes": [[1, 2]],
    }
    vocoder = build_vocoder(config)
    _fill(vocoder)
    wave = vocoder(torch.zeros(2, 10, 7))
    assert wave.shape == (2, 1, 7 * vocoder.config.hop)
    assert wave.abs().max() <= 1.0


def test_the_activation_is_its_formula_on_slow_signals() -> None:
    snake = SnakeBeta(1, log_scale=True)
    low_pass = torch.kaiser_window(FILTER_TAPS, periodic=False, beta=4.66) * torch.sinc((torch.arange(12) - 5.5) / 2)
    with torch.no_grad():
        for buffer in snake.buffers():
            buffer.copy_(low_pass / low_pass.sum())
        snake.alpha.fill_(0.3)
        snake.beta.fill_(-0.2)
        x = torch.sin(torch.linspace(0, 6, 400))[None, None]
        expected = x + torch.sin(x * torch.tensor(0.3).exp()) ** 2 / torch.tensor(-0.2).exp()
        torch.testing.assert_close(snake(x)[..., 20:-20], expected[..., 20:-20], atol=1e-3, rtol=0)


def test_yml_keys_that_train_are_left_out() -> None:
    config = vocoder_config({"upsample_initial_channel": 64, "learning_rate": 1e-4, "seed": 3})
    assert config == {**VOCODER_CONFIG, "upsample_initial_channel": 64}


@pytest.mark.parametrize(
    ("change", "named"), [({"resblock": "2"}, "resblock"), ({"activation": "snake"}, "activation")]
)
def test_unknown_kinds_of_vocoder_are_refused(change: dict[str, str], named: str) -> None:
    with raises("component_config", named):
        build_vocoder({**VOCODER_CONFIG, **change})


def test_incomplete_configurations_are_refused() -> None:
    with raises("component_config", "num_mels"):
        build_vocoder({key: value for key, value in VOCODER_CONFIG.items() if key != "num_mels"})
    with raises("component_config", "hidden_dim"):
        build_audio_vae({"data_dim": 80, "embed_dim": 20})


def test_tensors_of_another_shape_are_refused(goldens: Path) -> None:
    with raises("component_input", "(1, 31, 20)"):
        load_audio_vae(goldens, torch.float32).decode(torch.zeros(1, 31, 20))
    with raises("component_input", "(80, 10)"):
        load_vocoder(goldens, torch.float32)(torch.zeros(80, 10))


def _fill(module: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.copy_(torch.randn(tensor.shape, generator=generator).abs() * 0.1 + 0.01)
