"""Golden cases of the components: samplers, text encoder, video VAE, audio VAE, vocoder.

Every case builds its component at the recorded sizes, loads the recorded checkpoint, in its original format, with the
component's rule set, and yields the recorded tensors in forward order. Cases cover the recorded tensors only; a
component without recordings has no case.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from port_kit.errors import ParityError
from port_kit.models.wan.components import configs
from port_kit.models.wan.components.audio_vae import AudioVAE, build_audio_vae
from port_kit.models.wan.components.text_encoder import (
    TextEncoder,
    build_text_encoder,
    clean_prompt,
    load_tokenizer,
)
from port_kit.models.wan.components.video_vae import VideoVAE, build_video_vae
from port_kit.models.wan.components.vocoder import Vocoder, build_vocoder
from port_kit.models.wan.pipeline.scheduler import SOLVERS, build_scheduler
from port_kit.models.wan.weights.component_rules import AUDIO_VAE, TEXT_ENCODER, VAE, VOCODER
from port_kit.parity import Bound, Case, Pair
from port_kit.pipeline.precision import default_dtype
from port_kit.remap import RuleSet, load_weights

Tensors = Mapping[str, torch.Tensor]

WAN_FOLDER = Path("ckpts", "Wan2.2-TI2V-5B")
MMAUDIO_FOLDER = Path("ckpts", "MMAudio", "ext_weights")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

EXACT = Bound(max_abs=0.0, why="integers, or constants of the same formula")
SCHEDULER = Bound(max_abs=1e-6, why="the same arithmetic; diffusers' solvers return the same bits as the original")
TEXT = Bound(
    rel_l2=2e-6,
    why="the same operations; sums differ with the processor's vector width and transformers' release, by 8e-6 of 4.0",
)
CONVOLUTIONS = Bound(max_abs=1e-5, why="float32 convolutions, sums in another order")


def cases(goldens: Path) -> Iterator[Case]:
    """Yield the components' cases of a goldens folder, in the order in which a pipeline runs the components."""
    if (goldens / "scheduler").is_dir():
        for solver in SOLVERS:
            yield Case(f"scheduler/{solver} fp32+bf16", partial(run_scheduler, goldens, solver))
    for folder, run in (("umt5", run_text_encoder), ("mmaudio", run_mmaudio)):
        for word in DTYPES:
            if (goldens / folder / f"outputs_{word}.safetensors").is_file():
                yield Case(f"{folder} {word}", partial(run, goldens, word))
    if (goldens / "wan_vae").is_dir():
        yield Case("wan_vae fp32", partial(run_video_vae, goldens, torch.float32))
        yield Case("wan_vae bf16 weights", partial(run_video_vae, goldens, torch.bfloat16))


def run_scheduler(goldens: Path, solver: str) -> Iterator[Pair]:
    """Compare timesteps and noise levels of a solver, and each of its steps from the recorded sample."""
    recorded = load_file(goldens / "scheduler" / "scheduler.safetensors")
    shift = float(_read_json(goldens / "scheduler" / "scheduler.json").get("shift", 5.0))
    counts = {int(name.split(".")[1]) for name in recorded if name.startswith(f"{solver}.") and "traj" not in name}
    for steps in sorted(counts):
        scheduler = build_scheduler(solver, steps=steps, shift=shift)
        for attribute in ("timesteps", "sigmas"):
            name = f"{solver}.{steps}.{attribute}"
            yield Pair(name, getattr(scheduler, attribute), recorded[name], SCHEDULER)
    for word in DTYPES:
        yield from _run_trajectory(recorded, solver, f"{solver}.traj.{word}", shift)


def _run_trajectory(recorded: Tensors, solver: str, prefix: str, shift: float) -> Iterator[Pair]:
    steps = sum(name.startswith(f"{prefix}.") and name.endswith(".prev") for name in recorded)
    if not steps:
        return
    scheduler = build_scheduler(solver, steps=steps, shift=shift)
    for index, timestep in enumerate(scheduler.timesteps):
        output, sample = (recorded[f"{prefix}.{index}.{name}"] for name in ("model_output", "sample"))
        following = scheduler.step(output, timestep, sample, return_dict=False)[0]
        name = f"{prefix}.{index}.prev"
        yield Pair(name, following, recorded[name], SCHEDULER)


def run_text_encoder(goldens: Path, word: str) -> Iterator[Pair]:
    """Compare hidden states of padded ids, then tokens and states of cleaned prompts without padding."""
    folder = goldens / "umt5"
    inputs, expected = load_file(folder / "inputs.safetensors"), _outputs(folder, word)
    bounds = _bounds(folder, word, TEXT)
    encoder = load_text_encoder(goldens, DTYPES[word])
    if "ids" in inputs:
        states = encoder(inputs["ids"], inputs["mask"])
        yield from _pairs("hidden", states, expected, bounds)
    if not (folder / "texts.json").is_file():
        return
    tokenizer = load_tokenizer(goldens / WAN_FOLDER / "google" / "umt5-xxl")
    for index, text in enumerate(_read_json(folder / "texts.json")):
        wanted_ids, wanted_mask = inputs["text_ids"][index], inputs["text_mask"][index]
        ids = tokenizer(clean_prompt(text), truncation=True, max_length=len(wanted_ids))["input_ids"]
        yield Pair(f"text{index}.ids", torch.tensor(ids), wanted_ids[wanted_mask.bool()], EXACT)
        states = encoder(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.int64))
        yield from _pairs(f"text{index}", states[0], expected, bounds)


def run_video_vae(goldens: Path, precision: torch.dtype) -> Iterator[Pair]:
    """Compare encoding and decoding; in bfloat16, compare the outputs of the original's engine."""
    folder = goldens / "wan_vae"
    inputs, expected = load_file(folder / "inputs.safetensors"), _outputs(folder, "fp32")
    vae = load_video_vae(goldens, precision)
    engine = "engine." if precision == torch.bfloat16 else ""
    for name, run, source in (
        ("encode_image", vae.encode, "image"),
        ("encode_video", vae.encode, "video"),
        ("decode_image", vae.decode, "latents_image"),
        ("decode_video", vae.decode, "latents"),
    ):
        if engine + name in expected:
            yield Pair(engine + name, run(inputs[source]), expected[engine + name], CONVOLUTIONS)


def run_mmaudio(goldens: Path, word: str) -> Iterator[Pair]:
    """Compare mel front end, audio VAE and vocoder, separately and in the sequence of the original's wrapper."""
    folder = goldens / "mmaudio"
    inputs, expected = load_file(folder / "inputs.safetensors"), _outputs(folder, word)
    vae, vocoder = load_audio_vae(goldens, DTYPES[word]), load_vocoder(goldens, DTYPES[word])
    decoded = vae.decode(inputs["latents"])
    mel = vae.mel(inputs["wav"])
    if word == "fp32":
        for name, constant in (("mel_basis", vae.mel.bands), ("hann_window", vae.mel.window)):
            yield from _pairs(name, constant, expected, {"": EXACT})
    for name, actual in (
        ("wav_to_mel", mel),
        ("encode_moments", vae.encode_mel(mel)),
        ("wrapped_encode", vae.encode(inputs["wav"])),
        ("decode_mel", decoded),
        ("vocode", vocoder(inputs["mel"])),
        ("wrapped_decode", vocoder(decoded)),
    ):
        yield from _pairs(name, actual, expected, _bounds(folder, word, CONVOLUTIONS))


def load_text_encoder(goldens: Path, dtype: torch.dtype) -> TextEncoder:
    """Build the text encoder of a goldens folder and load its checkpoint, which sets the size of the vocabulary."""
    weights = _read_pickle(goldens / WAN_FOLDER / "models_t5_umt5-xxl-enc-bf16.pth")
    dims = _read_json(goldens / "SET.json")["t5"]
    config = configs.text_encoder_config(dims, vocab_size=weights["token_embedding.weight"].shape[0])
    return _loaded(partial(build_text_encoder, config), dtype, weights, TEXT_ENCODER)


def load_video_vae(goldens: Path, precision: torch.dtype) -> VideoVAE:
    """Build the video VAE of a goldens folder and load its checkpoint, rounded to ``precision``."""
    weights = _read_pickle(goldens / WAN_FOLDER / "Wan2.2_VAE.pth")
    config = configs.vae_config(_read_json(goldens / "SET.json")["vae"])
    return _loaded(partial(build_video_vae, config), precision, weights, VAE)


def load_audio_vae(goldens: Path, dtype: torch.dtype) -> AudioVAE:
    """Build the audio VAE of a goldens folder and load its checkpoint."""
    weights = _read_pickle(goldens / MMAUDIO_FOLDER / "v1-16.pth")
    config = configs.audio_vae_config(_read_json(goldens / "SET.json")["mmvae"])
    return _loaded(partial(build_audio_vae, config), dtype, weights, AUDIO_VAE)


def load_vocoder(goldens: Path, dtype: torch.dtype) -> Vocoder:
    """Build the vocoder of a goldens folder and load its checkpoint."""
    weights = _read_pickle(goldens / MMAUDIO_FOLDER / "best_netG.pt", "generator")
    return _loaded(partial(build_vocoder, read_vocoder_config(goldens)), dtype, weights, VOCODER)


def read_vocoder_config(goldens: Path) -> dict[str, Any]:
    """Read the generator's sizes from the folder's BigVGAN ``.yml``, else from ``SET.json``."""
    import yaml

    named = goldens / "mmaudio" / _read_json(goldens / "mmaudio" / "config.json").get("bigvgan", "none.yml")
    if named.is_file():
        return configs.vocoder_config(yaml.safe_load(named.read_text(encoding="utf-8")))
    return configs.vocoder_config(_read_json(goldens / "SET.json").get("bigvgan", {}))


def _loaded(build: Callable[[], Any], dtype: torch.dtype, weights: Tensors, rules: RuleSet) -> Any:
    """Build a module in a dtype and load a checkpoint into it."""
    with default_dtype(dtype):
        module: nn.Module = build()
    load_weights(module, weights.items(), rules)
    return module.eval()


def _bounds(folder: Path, word: str, exact: Bound) -> dict[str, Any]:
    """Return ``exact`` for float32; for bfloat16, the recorded float32 outputs that bounds are derived from."""
    return {"": exact} if word == "fp32" else {"fp32": _outputs(folder, "fp32")}


def _pairs(name: str, actual: torch.Tensor, expected: Tensors, bounds: Mapping[str, Any]) -> Iterator[Pair]:
    """Pair a tensor with the recorded one, if there is one.

    A bfloat16 tensor may differ from the recorded bfloat16 and float32 tensors by 1.5 times the distance between those
    two: the expected distance between two independent roundings is 1.41 times the size of one.
    """
    if name not in expected:
        return
    if "" in bounds:
        yield Pair(name, actual, expected[name], bounds[""])
        return
    exact = bounds["fp32"][name].double()
    gap = ((expected[name].double() - exact).norm() / exact.norm()).item()
    bound = Bound(rel_l2=1.5 * gap, why="1.5 times the original's distance between bfloat16 and float32")
    yield Pair(name, actual, expected[name], bound)
    yield Pair(f"{name} (against fp32)", actual, exact, bound)


def _outputs(folder: Path, word: str) -> dict[str, torch.Tensor]:
    return load_file(folder / f"outputs_{word}.safetensors")


def _read_json(path: Path) -> Any:
    if not path.is_file():
        raise ParityError(f"{path} is missing", code="goldens_invalid", hint="see docs/goldens.md for the layout")
    return json.loads(path.read_text(encoding="utf-8"))


def _read_pickle(path: Path, wrapper: str = "") -> Any:
    """Read a checkpoint in its original format, or the safetensors file that a download converted it to."""
    converted = path.with_suffix(".safetensors")
    if converted.is_file():
        return load_file(converted)
    if not path.is_file():
        raise ParityError(f"{path} is missing", code="goldens_invalid", hint="see docs/goldens.md for the layout")
    weights = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return weights[wrapper] if wrapper else weights
