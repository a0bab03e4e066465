"""End-to-end golden cases: latents of every step and outputs against recorded runs of the original engines.

A goldens folder holds checkpoints in the layout and formats of their original repositories. They are assembled into a
model directory like a download. The standard loader loads it, and the pipeline runs on the recorded noise, references
and arguments.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open

from port_kit.checkpoint.convert import convert_file
from port_kit.models.wan.components.configs import (
    audio_vae_config,
    text_encoder_config,
    vae_config,
)
from port_kit.models.wan.parity.component_cases import read_vocoder_config
from port_kit.models.wan.parity.recorded_runs import DREAMID, OVI_I2V, OVI_T2V, RecordedRun, RunRecording
from port_kit.models.wan.pipeline.request import MAX_TEXT_TOKENS
from port_kit.parity import Bound, Case, Pair
from port_kit.runtime.single_process import single_rank

if TYPE_CHECKING:
    from port_kit.pipeline.request_state import StepResult

#: Path in a goldens folder of the files of each Hub repository.
CHECKOUTS = {
    "XuGuo699/DreamID-Omni": "DreamID_Omni",
    "chetwinlow1/Ovi": "Ovi",
    "Wan-AI/Wan2.2-TI2V-5B": "Wan2.2-TI2V-5B",
    "hkchengrex/MMAudio": "MMAudio",
}
EXACT = Bound(max_abs=1e-4, why="errors of the steps accumulate")
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def dreamid_cases(goldens: Path) -> Iterator[Case]:
    """Yield all golden cases of DreamID-Omni: components, fusion transformer, end to end."""
    return _cases(goldens, DREAMID)


def ovi_cases(goldens: Path) -> Iterator[Case]:
    """Yield all golden cases of Ovi: components, fusion transformer, end to end from text and from a first frame."""
    return _cases(goldens, OVI_T2V, OVI_I2V)


def _cases(goldens: Path, *runs: RecordedRun) -> Iterator[Case]:
    from port_kit.models.wan.parity.family_cases import family_cases

    yield from family_cases(goldens)
    for run in runs:
        for precision in PRECISIONS:
            if (goldens / run.folder / f"trajectory_{precision}.safetensors").is_file():
                yield Case(f"{run.folder} {precision}", partial(run_e2e, goldens, precision, run))


def run_e2e(goldens: Path, precision: str = "fp32", run: RecordedRun = DREAMID) -> list[Pair]:
    """Run the pipeline with the recorded arguments; compare the recorded tensors in the order of the run."""
    from port_kit.pipeline.loading import load_pipeline

    recording = RunRecording.read(goldens / run.folder, precision)
    with tempfile.TemporaryDirectory(prefix="port-kit-") as folder:
        model = assemble(goldens, Path(folder), recording.record, run)
        with single_rank(PRECISIONS[precision]):
            return list(_compare(load_pipeline(model), recording, run))


def assemble(goldens: Path, target: Path, record: Mapping[str, Any], run: RecordedRun = DREAMID) -> Path:
    """Assemble a model directory from a goldens folder's checkpoints, like a download from their repositories."""
    for repository in run.recipe.repositories:
        checkout = goldens / "ckpts" / CHECKOUTS[repository.repo_id]
        for rule in repository.files:
            for path in sorted(checkout.glob(rule.pattern)):
                place = target / rule.target(path.relative_to(checkout).as_posix())
                place.parent.mkdir(parents=True, exist_ok=True)
                if rule.convert:
                    convert_file(path, place, wrapper=rule.wrapper)
                else:
                    shutil.copyfile(path, place)
    configs = _configs(goldens, target, run.rope(record))
    recipe = run.recipe.with_(configs=configs, model_index=run.index(record))
    files = {f"{name}/config.json": content for name, content in recipe.configs.items()}
    for name, content in (files | {"model_index.json": recipe.model_index}).items():
        (target / name).write_text(json.dumps(content), encoding="utf-8")
    return target


def _configs(goldens: Path, target: Path, rope: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return the components' configurations for the sizes of ``SET.json``."""
    dims = json.loads((goldens / "SET.json").read_text(encoding="utf-8"))
    # the engines pad texts to the tokenizer's length, which may differ from the length in transformer cases
    towers = {name: {**dims["fusion"][name], "text_len": MAX_TEXT_TOKENS} for name in ("video", "audio")}
    return {
        "transformer": {**towers, "rope": rope},
        "text_encoder": text_encoder_config(dims["t5"], vocab_size=_vocabulary(target)),
        "vae": vae_config(dims["vae"]),
        "audio_vae": audio_vae_config(dims["mmvae"]),
        "vocoder": read_vocoder_config(goldens),
    }


def _vocabulary(model: Path) -> int:
    with safe_open(model / "text_encoder" / "model.safetensors", framework="pt") as file:
        return int(file.get_slice("token_embedding.weight").get_shape()[0])


def request_of(recording: RunRecording, run: RecordedRun = DREAMID) -> Any:
    """Return a request of vLLM-Omni with the recorded arguments and noise."""
    from vllm_omni.diffusion.request import OmniDiffusionRequest
    from vllm_omni.diffusion.worker.request_batch import DiffusionRequestBatch
    from vllm_omni.inputs.data import OmniDiffusionSamplingParams

    prompt, fields = run.request(recording)
    sampling = OmniDiffusionSamplingParams(**fields)
    return DiffusionRequestBatch([OmniDiffusionRequest(prompt, sampling, "golden")])


@torch.inference_mode()
def _compare(pipeline: Any, recording: RunRecording, run: RecordedRun) -> Iterable[Pair]:
    """Run the pipeline once and yield the recorded tensors in the order of computation."""
    request = request_of(recording, run).requests[0]
    prepared = pipeline.prepare(request.prompt, request.sampling_params)
    seen: dict[str, torch.Tensor] = {f"pixels_to_vae.{i}": x[None, :, None] for i, x in enumerate(prepared.images)}
    (state,) = pipeline.begin(prepared)
    given = state.conditioning
    seen["ref.image_latents"] = given.images[0]
    seen["ref.audio_latents"] = given.audios[0]
    seen |= {f"text.{i}": text.raw[0] for i, text in enumerate((given.texts[0], *given.negatives))}

    def record_step(step: StepResult) -> None:
        for name in step.latents:
            seen[f"{name}.step{step.index}.guided"] = step.guided[name][0]
        for name, latent in step.latents.items():
            seen[f"{name}.step{step.index}.latent_after"] = latent[0]

    pipeline.on_step = record_step
    while not state.is_done:
        pipeline.scheduler_step(state, *pipeline.predict([state]))
    decoded = pipeline.decode(state)
    seen["video.frames"] = _recorded_part(decoded["video"][0], recording, "video.frames", dim=1)
    seen["audio.wave"] = _recorded_part(decoded["audio"], recording, "audio.wave", dim=0)
    for name, value in seen.items():
        if name in recording.tensors:
            yield Pair(name, value, recording.tensors[name], recording.bounds.get(name, EXACT))


def _recorded_part(value: torch.Tensor, recording: RunRecording, name: str, *, dim: int) -> torch.Tensor:
    """Return the recorded frames or samples: those with the indices ``<name>_index``, if present, else all."""
    index = recording.tensors.get(f"{name}_index")
    return value if index is None else value.index_select(dim, index)
