"""Golden cases of the components outside of the denoisers: scheduler, text encoder, video VAE, audio VAE."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from port_kit.models.mova.model.scheduler import FlowEuler, Schedule
from port_kit.models.mova.parity.goldens import DTYPES, Goldens, compare
from port_kit.models.wan.components.text_encoder import clean_prompt, load_tokenizer
from port_kit.parity import Bound, Case, Pair
from port_kit.pipeline.precision import default_dtype

EXACT = Bound(max_abs=0.0, why="integers, or constants of the same formula")
SCHEDULER = Bound(max_abs=1e-6, why="the same arithmetic in float32")
TIMESTEPS = Bound(max_abs=1e-4, why="1000 times a float32 level")
TEXT = Bound(rel_l2=2e-6, why="the same operations; sums differ with the processor's vector width")
CONVOLUTIONS = Bound(max_abs=1e-5, why="float32 convolutions, sums in another order")
_RUN = re.compile(r"shift([\d.]+)_n(\d+)\.timesteps")


def cases(goldens: Goldens) -> Iterator[Case]:
    """Yield the cases of the recorded components."""
    if goldens.tensors("scheduler/scheduler"):
        yield Case("scheduler fp32", partial(run_scheduler, goldens))
    for folder, run in (("text_encoder", run_text_encoder), ("video_vae", run_video_vae), ("audio_vae", run_audio_vae)):
        for word in DTYPES:
            if goldens.tensors(f"{folder}/outputs_{word}"):
                yield Case(f"{folder} {word}", partial(run, goldens, word))


def run_scheduler(goldens: Goldens) -> Iterator[Pair]:
    """Compare training levels, timesteps, the levels that steps use, and trajectories of both modalities."""
    recorded = goldens.tensors("scheduler/scheduler")
    for shift in sorted({match[1] for name in recorded if (match := re.match(r"train\.shift([\d.]+)\.sigmas", name))}):
        schedule = Schedule(float(shift))
        for kind, bound in (("sigmas", SCHEDULER), ("timesteps", TIMESTEPS)):
            own: Tensor = getattr(schedule, kind)(schedule.training_steps)
            yield Pair(f"train.shift{shift}.{kind}", own, recorded[f"train.shift{shift}.{kind}"], bound)
    for match in filter(None, map(_RUN.fullmatch, recorded)):
        yield from _run_steps(recorded, match[0].removesuffix(".timesteps"), float(match[1]), int(match[2]))


def _run_steps(recorded: dict[str, Tensor], run: str, shift: float, steps: int) -> Iterator[Pair]:
    schedule = Schedule(shift)
    solver = FlowEuler(schedule, steps)
    yield Pair(f"{run}.timesteps", solver.timesteps, recorded[f"{run}.timesteps"], TIMESTEPS)
    yield Pair(f"{run}.pairs", torch.stack((solver.timesteps,) * 2, 1), recorded[f"{run}.pairs"], TIMESTEPS)
    yield Pair(f"{run}.sigmas", schedule.sigmas(steps), recorded[f"{run}.sigmas"], SCHEDULER)
    yield Pair(f"{run}.used_sigmas", solver.sigmas, recorded[f"{run}.used_sigmas"], SCHEDULER)
    sample, trajectory = recorded[f"{run}.sample"], []
    for timestep, output in zip(solver.timesteps, recorded[f"{run}.model_outputs"], strict=True):
        (sample,) = solver.step(output, timestep, sample)
        trajectory.append(sample)
    yield Pair(f"{run}.trajectory", torch.stack(trajectory), recorded[f"{run}.trajectory"], SCHEDULER)
    for name in (name for name in recorded if name.startswith(f"{run}.dual_") and name.endswith(".pairs")):
        shifts = [float(value) for value in name.removesuffix(".pairs").split("dual_")[1].split("_")]
        video, audio = (FlowEuler(schedule, steps, shift=value) for value in shifts)
        yield Pair(name, torch.stack((video.timesteps, audio.timesteps), 1), recorded[name], TIMESTEPS)
        used = name.replace(".pairs", ".used_audio_sigmas")
        yield Pair(used, audio.sigmas, recorded[used], SCHEDULER)


def run_text_encoder(goldens: Goldens, word: str) -> Iterator[Pair]:
    """Compare tokens and states of cleaned prompts, without padding."""
    inputs, texts = goldens.tensors("text_encoder/inputs"), goldens.json("text_encoder/texts.json")
    exact, rounded = _outputs(goldens, "text_encoder", word)
    tokenizer = load_tokenizer(goldens.checkpoint / "tokenizer")
    with default_dtype(DTYPES[word]):
        encoder = goldens.component("text_encoder")
    for index, text in enumerate(texts["texts"]):
        wanted, mask = inputs["ids"][index], inputs["mask"][index].bool()
        cleaned = clean_prompt(text)
        assert cleaned == texts["cleaned"][index], (cleaned, texts["cleaned"][index])
        ids = torch.tensor(tokenizer(cleaned)["input_ids"])
        yield Pair(f"text{index}.ids", ids, wanted[mask], EXACT)
        states = encoder(ids[None], torch.ones_like(ids[None]))[0]
        yield from compare(f"text{index}", states, exact, rounded, TEXT)


def run_video_vae(goldens: Goldens, word: str) -> Iterator[Pair]:
    """Compare encoding, normalization and decoding of an image and of a clip."""
    inputs = goldens.tensors("video_vae/inputs")
    exact, rounded = _outputs(goldens, "video_vae", word)
    with default_dtype(DTYPES[word]):
        vae = goldens.component("video_vae")
    mean, std = (torch.tensor(getattr(vae.config, f"latents_{name}")).view(1, -1, 1, 1, 1) for name in ("mean", "std"))
    clip = inputs["clip"]
    for kind, pixels in (("clip", clip), ("image", clip[:, :, :1])):
        latents = vae.encode(pixels)
        yield from compare(f"encode_{kind}", latents * std + mean, exact, rounded, CONVOLUTIONS)
        if kind == "clip":
            yield from compare("normalized", latents, exact, rounded, CONVOLUTIONS)
    yield from compare("denormalized", inputs["latents"] * std + mean, exact, rounded, CONVOLUTIONS)
    for kind, latents in (("clip", inputs["latents"]), ("image", inputs["latents_image"])):
        yield from compare(f"decode_{kind}", vae.decode(latents), exact, rounded, CONVOLUTIONS)


def run_audio_vae(goldens: Goldens, word: str) -> Iterator[Pair]:
    """Compare decoding."""
    exact, rounded = _outputs(goldens, "audio_vae", word)
    with default_dtype(DTYPES[word]):
        vae = goldens.component("audio_vae")
    wave = vae.decode(goldens.tensors("audio_vae/inputs")["latents"])
    yield from compare("decode", wave[:, None], exact, rounded, CONVOLUTIONS)


def _outputs(goldens: Goldens, folder: str, word: str) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
    rounded = goldens.tensors(f"{folder}/outputs_bf16") if word == "bf16" else None
    return goldens.tensors(f"{folder}/outputs_fp32"), rounded
