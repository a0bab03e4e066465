"""End to end against the reference engine's own run: the real loader, the real pipeline, latents of every step.

A goldens folder holds checkpoints in their original repositories' layout and containers. They are assembled into a
model directory as a download would do it, and the pipeline is run on the recorded noise, references and arguments.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from port_kit.download import Recipe
from port_kit.download.convert import convert_file
from port_kit.models.dreamid_omni.recipe import RECIPE
from port_kit.models.wan_fusion.component_configs import (
    audio_vae_config,
    text_encoder_config,
    vae_config,
)
from port_kit.models.wan_fusion.golden_components import read_vocoder_config
from port_kit.models.wan_fusion.request import MAX_TEXT_TOKENS
from port_kit.parity import Bound, Case, Pair
from port_kit.runtime.local import single_rank

if TYPE_CHECKING:
    from port_kit.models.dreamid_omni.pipeline import DreamIDOmniPipeline
    from port_kit.models.wan_fusion.denoising import Step

#: Where a goldens folder keeps the files of each Hub repository.
CHECKOUTS = {
    "XuGuo699/DreamID-Omni": "DreamID_Omni",
    "Wan-AI/Wan2.2-TI2V-5B": "Wan2.2-TI2V-5B",
    "hkchengrex/MMAudio": "MMAudio",
}
EXACT = Bound(max_abs=1e-4, why="errors of the steps add up")
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
#: Two independent roundings of size g lie about 1.41 g apart.
GAPS = 1.5


@dataclass(frozen=True)
class Recording:
    """What the reference engine was given and what it gave.

    Attributes:
        record: arguments, constants and shapes.
        tensors: noise, latents after every step, some decoded frames, the sound.
        folder: paths among the arguments are relative to it.
        bounds: of a tensor's difference; :data:`EXACT` where it has none.
    """

    record: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor]
    folder: Path
    bounds: Mapping[str, Bound] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path, precision: str = "fp32") -> Recording:
        """Read ``record_<precision>.json`` and ``trajectory_<precision>.safetensors``."""
        record = json.loads((folder / f"record_{precision}.json").read_text(encoding="utf-8"))
        tensors = load_file(folder / f"trajectory_{precision}.safetensors")
        if precision == "fp32":
            return cls(record, tensors, folder)
        exact = load_file(folder / "trajectory_fp32.safetensors")
        return cls(record, tensors, folder, {name: _gap(value, exact[name]) for name, value in tensors.items()})

    def media(self, kind: str) -> list[str]:
        """Return the paths of the reference ``image`` or ``audio`` files, in order."""
        arguments = self.record["args"]
        names = sorted(name for name in arguments if name.startswith(kind) and name.endswith("_path"))
        return [str((self.folder / arguments[name]).resolve()) for name in names]


def dreamid_cases(goldens: Path) -> Iterator[Case]:
    """Yield all golden cases of DreamID-Omni: components, fusion transformer, end to end."""
    from port_kit.models.wan_fusion.goldens import family_cases

    yield from family_cases(goldens)
    for precision in PRECISIONS:
        if (goldens / "e2e_dreamid" / f"trajectory_{precision}.safetensors").is_file():
            yield Case(f"e2e_dreamid {precision}", partial(run_e2e, goldens, precision))


def run_e2e(goldens: Path, precision: str = "fp32") -> list[Pair]:
    """Run the pipeline as the reference engine was run; compare whatever is recorded, in the order of the run."""
    recording = Recording.read(goldens / "e2e_dreamid", precision)
    with tempfile.TemporaryDirectory(prefix="port-kit-") as folder:
        model = assemble(goldens, Path(folder), recording.record)
        with single_rank(PRECISIONS[precision]):
            return list(_compare(load_pipeline(model), recording))


def _gap(rounded: torch.Tensor, exact: torch.Tensor) -> Bound:
    """Bound a difference by what rounding costs the reference itself."""
    gap = (rounded.double() - exact.double()).norm() / exact.double().norm()
    return Bound(rel_l2=GAPS * gap.item(), why=f"{GAPS} times the reference's own distance from float32")


def assemble(goldens: Path, target: Path, record: Mapping[str, Any]) -> Path:
    """Make a model directory from a goldens folder's checkpoints, as a download from their repositories would."""
    for repository in RECIPE.repositories:
        checkout = goldens / "ckpts" / CHECKOUTS[repository.repo_id]
        for rule in repository.files:
            for path in sorted(checkout.glob(rule.pattern)):
                place = target / rule.target(path.relative_to(checkout).as_posix())
                place.parent.mkdir(parents=True, exist_ok=True)
                if rule.convert:
                    convert_file(path, place, wrapper=rule.wrapper)
                else:
                    shutil.copyfile(path, place)
    _write_configs(RECIPE.with_(configs=_configs(goldens, target, record), model_index=record["constants"]), target)
    return target


def _write_configs(recipe: Recipe, target: Path) -> None:
    files = {f"{name}/config.json": content for name, content in recipe.configs.items()}
    for name, content in (files | {"model_index.json": recipe.model_index}).items():
        (target / name).write_text(json.dumps(content), encoding="utf-8")


def _configs(goldens: Path, target: Path, record: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Translate the dims of ``SET.json``; the engine's frequency scaling is in the record of its run."""
    dims = json.loads((goldens / "SET.json").read_text(encoding="utf-8"))
    # The engine pads texts to the tokenizer's length, whatever the direct cases of the transformer pad to.
    towers = {name: {**dims["fusion"][name], "text_len": MAX_TEXT_TOKENS} for name in ("video", "audio")}
    constants = record["constants"]
    scaling = {
        "num": constants["video_latent_length"],
        "den": constants["audio_latent_length"],
        "dtype": record["call0"]["freqs_scaling"].split()[0].removeprefix("torch."),
    }
    return {
        "transformer": {**towers, "rope": {"family": "dreamid_omni", "freqs_scaling": scaling}},
        "text_encoder": text_encoder_config(dims["t5"], vocab_size=_vocabulary(target)),
        "vae": vae_config(dims["vae"]),
        "audio_vae": audio_vae_config(dims["mmvae"]),
        "vocoder": read_vocoder_config(goldens),
    }


def _vocabulary(model: Path) -> int:
    with safe_open(model / "text_encoder" / "model.safetensors", framework="pt") as file:
        return int(file.get_slice("token_embedding.weight").get_shape()[0])


def load_pipeline(model: Path) -> DreamIDOmniPipeline:
    """Build the pipeline of a model directory and fill it with the standard loader; inside ``single_rank`` only."""
    from vllm.config.load import LoadConfig
    from vllm_omni.diffusion.data import OmniDiffusionConfig
    from vllm_omni.diffusion.model_loader.diffusers_loader import DiffusersPipelineLoader

    from port_kit.models.dreamid_omni.pipeline import DreamIDOmniPipeline

    od_config = OmniDiffusionConfig(model=str(model), dtype=torch.get_default_dtype())
    pipeline = DreamIDOmniPipeline(od_config=od_config)
    DiffusersPipelineLoader(LoadConfig(), od_config).load_weights(pipeline)
    return pipeline


def request_of(recording: Recording) -> Any:
    """Return the recorded arguments as vLLM-Omni's request, with the recorded noise."""
    from vllm_omni.diffusion.request import OmniDiffusionRequest
    from vllm_omni.diffusion.worker.request_batch import DiffusionRequestBatch
    from vllm_omni.inputs.data import OmniDiffusionSamplingParams

    arguments = recording.record["args"]
    scales = {name: value for name, value in arguments.items() if name.endswith("_cfg_scale")}
    negatives = {name: arguments[name] for name in ("video_negative_prompt", "audio_negative_prompt")}
    height, width = arguments["video_frame_height_width"]
    sampling = OmniDiffusionSamplingParams(
        height=height,
        width=width,
        num_inference_steps=arguments["sample_steps"],
        seed=arguments["seed"],
        extra_args={
            "solver_name": arguments["solver_name"],
            "shift": arguments["shift"],
            "video_noise": recording.tensors["video.noise"],
            "audio_noise": recording.tensors["audio.noise"],
            **scales,
            **negatives,
        },
    )
    media = {kind: recording.media(kind) for kind in ("image", "audio")}
    prompt = {"prompt": arguments["text_prompt"], "multi_modal_data": media}
    return DiffusionRequestBatch([OmniDiffusionRequest(prompt, sampling, "golden")])


@torch.inference_mode()
def _compare(pipeline: DreamIDOmniPipeline, recording: Recording) -> Iterable[Pair]:
    """Run once and yield what is recorded, in the order in which the pipeline computes it."""
    job = pipeline.prepare(request_of(recording))
    seen: dict[str, torch.Tensor] = {f"pixels_to_vae.{i}": x[None, :, None] for i, x in enumerate(job.pictures)}
    conditions = pipeline.conditions(job)
    seen["ref.image_latents"] = conditions.pictures[0]
    seen["ref.audio_latents"] = conditions.voices[0]
    texts = (conditions.texts[0], *conditions.negatives)
    seen |= {f"text.{i}": text.raw[0] for i, text in enumerate(texts)}

    def watch(step: Step) -> None:
        for name, value in (("video", step.guided_video), ("audio", step.guided_audio)):
            seen[f"{name}.step{step.index}.guided"] = value[0]
        for name, value in (("video", step.video), ("audio", step.audio)):
            seen[f"{name}.step{step.index}.latent_after"] = value[0]

    pipeline.on_step = watch
    video, audio = pipeline.generate(job)
    seen["video.frames"] = video[0][:, recording.tensors["video.frames_index"]]
    seen["audio.wave"] = audio
    for name, value in seen.items():
        if name in recording.tensors:
            yield Pair(name, value, recording.tensors[name], recording.bounds.get(name, EXACT))
