"""Training of the parts that make latents of clips and clips of latents: video VAE, audio VAE and vocoder.

Shapes: B clips, F frames and f latent frames, H x W pixels, S samples, M mel frames, L audio latents.
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.tiny_world import parts
from benchmarks.tiny_world.clips import FRAMES, RATE, SAMPLES, Scenes, World
from benchmarks.tiny_world.grammar import PITCHES, TEMPI, held_back
from benchmarks.tiny_world.scores import measure, score
from benchmarks.tiny_world.stepper import Losses, Options, Stepper
from port_kit.models.wan.components.vocoder import Vocoder

VIDEO_BATCH, VIDEO_FRAMES = 32, 17
AUDIO_BATCH, AUDIO_SAMPLES = 64, 32_768
VOCODER_BATCH, VOCODER_SAMPLES = 24, 16_384
EVALUATED = 32  # held-back prompts
_KL = 1e-3
_FOREGROUND = 8.0  # weight of the shape and its surroundings, beside 1 of the background
_LATENT_NOISE = 0.2  # of the audio VAE's latents, whose deviation is 1
_SMALLEST_STD = 0.15  # of a video latent's channel; channels that hold nothing are not amplified
_WRONG = 4.0  # a pitch that the vocoder makes wrong when a training begins is drawn this much more often
_SPECTRA = 0.1  # weight of the spectra beside the samples
_STFT = (256, 512, 1024, 2048)


def small(options: Options, count: int) -> int:
    """Return the size of a batch; a CPU gets a small one, to try the code."""
    return count if options.on_gpu else max(2, count // 16)


def decode_frames(vae: Any, latents: Tensor) -> Tensor:
    """Return pixels ``[B, 3, F, H, W]`` of latents that are not normalized, not clamped, so that gradients pass."""
    vae.clear_cache()
    x = vae.post_quant_conv(latents)
    chunks = []
    for index in range(x.shape[2]):
        vae._conv_idx = [0]
        first = {"first_chunk": True} if index == 0 else {}
        chunks.append(
            vae.decoder(x[:, :, index : index + 1], feat_cache=vae._feat_map, feat_idx=vae._conv_idx, **first)
        )
    vae.clear_cache()
    return unpatchify(torch.cat(chunks, 2), patch_size=vae.config.patch_size)


def train_vae(options: Options, seconds: float) -> None:
    """Train the video VAE: absolute error, largest weight on the shape, and a small divergence from a normal."""
    world = World(options.device)
    vae: Any = start("vae", options)
    batch = small(options, VIDEO_BATCH)
    steps = torch.arange(VIDEO_FRAMES, device=options.device, dtype=torch.float32)

    def losses() -> Losses:
        offset = torch.randint(FRAMES - VIDEO_FRAMES + 1, (batch, 1), device=options.device)
        pixels, cover = world.pixels(world.anything(batch), offset + steps)
        with options.autocast():
            mean, spread = vae._encode(pixels).float().chunk(2, 1)
            spread = spread.clamp(-20, 10)
            latents = mean + torch.exp(0.5 * spread) * torch.randn_like(mean)
            made = decode_frames(vae, latents).float()
        weight = 1 + _FOREGROUND * F.max_pool3d(cover, (1, 5, 5), 1, (0, 2, 2))
        error = made - pixels
        absolute = (weight * error.abs()).sum() / (3 * weight.sum())
        square = (weight * error.square()).sum() / (3 * weight.sum())
        divergence = 0.5 * (mean.square() + spread.exp() - 1 - spread).mean()
        return {
            "loss": absolute + 0.5 * square + _KL * divergence,
            "absolute": absolute,
            "divergence": divergence,
            "psnr": -10 * torch.log10(error.square().mean() / 4),
        }

    stepper = Stepper("vae", dict(vae.named_parameters()), [losses], options, rate=2e-3, average=0.99)
    stepper.run(seconds)
    stepper.use_averages()
    with torch.no_grad():
        config, facts = _video_statistics(vae, world, options)
    parts.save(options.output, "vae", vae, config, {"step": stepper.step, **facts})
    options.log(stage="vae", step=stepper.step, **facts)


def _video_statistics(vae: Any, world: World, options: Options) -> tuple[dict[str, Any], dict[str, float]]:
    """Return the mean and deviation of the latents' channels, and the scores of clips that were coded and decoded."""
    given = held_back(small(options, EVALUATED))
    scenes = world.described(given, seed=1)
    pixels, _ = world.pixels(scenes)
    latents = torch.cat([vae._encode(part).chunk(2, 1)[0] for part in pixels.split(8)])
    made = torch.cat([decode_frames(vae, part).clamp(-1, 1) for part in latents.split(8)])
    found = score(made, world.wave(scenes), given)
    deviation, mean = torch.std_mean(latents.float(), (0, 2, 3, 4))
    psnr = -10 * math.log10(float((made - pixels).square().mean()) / 4)
    config = {"latents_mean": mean.tolist(), "latents_std": deviation.clamp(min=_SMALLEST_STD).tolist()}
    kept = ("colour", "shape", "tempo", "direction", "in_time")
    used = int((deviation > _SMALLEST_STD).sum())
    return config, {"psnr": round(psnr, 2), "channels": used, **{name: found[name] for name in kept}}


def _part_of_clip(world: World, batch: int, samples: int, pitches: Tensor | None = None) -> tuple[Scenes, Tensor]:
    """Return scenes and the start of a piece of sound in seconds; some begin before the clip, in silence."""
    scenes = world.anything(batch, pitches)
    return scenes, torch.rand(batch, device=world.device) * ((SAMPLES - samples) / RATE + 0.2) - 0.2


def train_audio_vae(options: Options, seconds: float) -> None:
    """Train the audio VAE on log-mel spectrograms, with noise on its latents."""
    world = World(options.device)
    vae: Any = start("audio_vae", options)
    batch = small(options, AUDIO_BATCH)
    filters = [value for name, value in vae.named_parameters() if value.ndim == 3]

    @torch.no_grad()
    def unit_norm() -> None:
        for value in filters:
            value.div_(torch.linalg.vector_norm(value, dim=(1, 2), keepdim=True).clamp(min=1e-6))

    unit_norm()
    if options.results is None:  # the same in a continued training: the seed is the stage's
        mel = vae.mel(world.wave(world.anything(batch)))
        deviation, mean = torch.std_mean(mel, (0, 2), keepdim=True)
        vae.data_mean.copy_(mean)
        vae.data_std.copy_(deviation.clamp(min=0.05))

    def losses() -> Losses:
        scenes, start = _part_of_clip(world, batch, AUDIO_SAMPLES)
        mel = vae.mel(world.wave(scenes, AUDIO_SAMPLES, start))
        with options.autocast():
            mean = vae.encode_mel.__wrapped__(vae, mel)[:, : vae.embed_dim].float()
            unit = mean / mean.square().mean().sqrt()
            made = vae.decoder(unit + _LATENT_NOISE * torch.randn_like(unit)).float()
        error = made - (mel - vae.data_mean) / vae.data_std
        centre = unit.mean((0, 2)).square().mean()
        rough = (unit[..., 1:] - unit[..., :-1]).square().mean()
        absolute = error.abs().mean()
        return {"loss": absolute + 0.1 * centre + 0.01 * rough, "absolute": absolute, "centre": centre}

    stepper = Stepper("audio_vae", dict(vae.named_parameters()), [losses], options, rate=1e-2, after=unit_norm)
    stepper.run(seconds)
    with torch.no_grad():  # the decoder does not depend on the scale of its input
        wave = world.wave(world.anything(batch))
        vae.encoder.gain.copy_((vae.encoder.gain + 1) / vae.encode(wave).square().mean().sqrt() - 1)
        latents = vae.encode(wave)
        error = (vae.decode(latents) - vae.mel(wave)[..., : 2 * latents.shape[-1]]).abs().mean()
    facts = {"error": round(float(error), 4), "deviation": round(float(latents.std()), 3)}
    parts.save(options.output, "audio_vae", vae, {}, {"step": stepper.step, **facts})
    options.log(stage="audio_vae", step=stepper.step, **facts)


class SpectralLoss(nn.Module):
    """Distance of sounds in magnitudes of several resolutions, and in loudness."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        for size in _STFT:
            self.register_buffer(f"window_{size}", torch.hann_window(size, device=device))

    def forward(self, made: Tensor, true: Tensor) -> Losses:
        """Return the losses of ``[B, S]``."""
        linear = logarithmic = made.new_zeros(())
        for size in _STFT:
            a, b = self._magnitude(made, size), self._magnitude(true, size)
            linear = linear + (a - b).abs().mean() / b.mean().clamp(min=1e-4)
            logarithmic = logarithmic + (torch.log(a + 1e-4) - torch.log(b + 1e-4)).abs().mean()
        loud = (_loudness(made) - _loudness(true)).abs().mean() / _loudness(true).mean().clamp(min=1e-3)
        count = len(_STFT)
        return {
            "loss": linear / count + logarithmic / count + 2 * loud,
            "linear": linear / count,
            "logarithmic": logarithmic / count,
            "loudness": loud,
        }

    def _magnitude(self, wave: Tensor, size: int) -> Tensor:
        window = getattr(self, f"window_{size}")
        spectrum = torch.stft(wave, size, size // 4, window=window, return_complex=True, pad_mode="constant")
        return torch.sqrt(torch.view_as_real(spectrum).square().sum(-1) + 1e-10) / (size / 4)


def _loudness(wave: Tensor) -> Tensor:
    return torch.sqrt(F.avg_pool1d(wave.square()[:, None], 128, 64)[:, 0] + 1e-8)


def train_vocoder(options: Options, seconds: float) -> None:
    """Train the vocoder on true spectrograms and on those that the audio VAE decodes.

    While a pitch is wrong, samples are compared beside the spectra: with the tones of the vocoder that the training
    began with, where their pitch was right, else with true tones whose phase every frame can know. Spectra alone took
    a tone of 375 Hz for one of 250 Hz with the same harmonic, and stayed there.
    """
    world, distance = World(options.device), SpectralLoss(options.device)
    vocoder: Any = start("vocoder", options)
    audio_vae: Any = parts.load(options.output, "audio_vae", options.device)[0]
    batch = options.batch or small(options, VOCODER_BATCH)
    length = VOCODER_SAMPLES if options.on_gpu else VOCODER_SAMPLES // 4
    forward: Any = Vocoder.forward.__wrapped__  # type: ignore[attr-defined] # without torch.no_grad
    wrong = _wrong_pitches(world, vocoder, audio_vae)
    any_wrong = bool(wrong.any())
    options.log(stage="vocoder", wrong=dict(zip(PITCHES, wrong.tolist(), strict=True)))
    earlier = copy.deepcopy(vocoder)

    def losses() -> Losses:
        scenes, start = _part_of_clip(world, batch, length, 1 + _WRONG * wrong)
        true = world.wave(scenes, length, start)
        with torch.no_grad():
            mel = audio_vae.mel(true)
            decoded = audio_vae.decode(audio_vae.encode(true))
            mel = torch.cat((mel[: batch // 4], decoded[batch // 4 :]))
            mel = mel + 0.02 * torch.randn_like(mel)
            replaced = ((scenes.hertz[:, None] == world.hertz) * wrong).sum(1, keepdim=True) > 0
            aligned = world.wave(scenes, length, start, aligned=True)
            target = torch.where(replaced, aligned, earlier(mel)[:, 0])
        made = forward(vocoder, mel)[:, 0].float()
        found = distance(made, true)
        if not any_wrong:
            return found
        samples = (made - target).square().mean() / target.square().mean().clamp(min=1e-4)
        return {**found, "loss": _SPECTRA * found["loss"] + samples, "samples": samples}

    stepper = Stepper("vocoder", dict(vocoder.named_parameters()), [losses], options, rate=2e-3, average=0.99)
    stepper.run(seconds)
    stepper.use_averages()
    parts.save(options.output, "vocoder", vocoder, {}, {"step": stepper.step})
    given = held_back(small(options, EVALUATED))
    scenes = world.described(given, seed=1)
    with torch.no_grad():
        latents = audio_vae.encode(world.wave(scenes))
        made = torch.cat([vocoder(audio_vae.decode(part))[:, 0] for part in latents.split(4)])
    found = score(world.pixels(scenes)[0], made, given)
    facts = {name: found[name] for name in ("pitch", "in_time")}
    parts.save(options.output, "vocoder", vocoder, {}, {"step": stepper.step, **facts})
    options.log(stage="vocoder", step=stepper.step, **facts)


@torch.no_grad()
def _wrong_pitches(world: World, vocoder: Any, audio_vae: Any) -> Tensor:
    """Return the share of two clips of each pitch that the vocoder gives another pitch."""
    given = [replace(held_back(1)[0], tempo=tempo, pitch=pitch) for pitch in PITCHES for tempo in TEMPI]
    scenes = world.described(given, seed=1)
    made = vocoder(audio_vae.mel(world.wave(scenes)))[:, 0].float()
    found = measure(world.pixels(scenes)[0], made)
    wrong = [one.pitch != description.pitch for one, description in zip(found, given, strict=True)]
    return torch.tensor(wrong, device=world.device).float().view(len(PITCHES), -1).mean(1)


def start(name: str, options: Options) -> nn.Module:
    """Return a part to train: an earlier result, or initial values."""
    stored = options.result(name)
    return parts.load(stored.parent, name, options.device)[0] if stored else parts.build(name, options.device)
