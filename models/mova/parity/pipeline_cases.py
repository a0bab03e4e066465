"""End-to-end golden cases: first frame, texts, latents of every step and outputs of recorded runs of the original.

A goldens folder holds a repository in the original's layout. It becomes a model directory like a download, the standard
loader loads it, and the pipeline runs on the recorded arguments.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from port_kit.models.mova.parity.goldens import DTYPES, Goldens, compare
from port_kit.models.mova.recipe import FOLDERS, RECIPE
from port_kit.parity import Bound, Case, Pair
from port_kit.runtime.single_process import single_rank

if TYPE_CHECKING:
    from port_kit.pipeline.request_state import StepResult

EXACT = Bound(max_abs=1e-4, why="errors of the steps accumulate")
FRAMES = Bound(max_abs=1.0, why="a value next to a half is rounded to either side")


def cases(goldens: Goldens) -> Iterator[Case]:
    """Yield the recorded runs in both dtypes."""
    for path in sorted(goldens.folder.glob("e2e*/record_fp32.json")):
        for word in DTYPES:
            if goldens.tensors(f"{path.parent.name}/trajectory_{word}"):
                yield Case(f"{path.parent.name} {word}", partial(run_e2e, goldens, path.parent.name, word))


def run_e2e(goldens: Goldens, run: str, word: str) -> Iterator[Pair]:
    """Run the pipeline with recorded arguments; compare the recorded tensors in the order of the run."""
    from port_kit.pipeline.loading import load_pipeline

    record = goldens.json(f"{run}/record_{word}.json")
    exact = goldens.tensors(f"{run}/trajectory_fp32")
    rounded = goldens.tensors(f"{run}/trajectory_bf16") if word == "bf16" else None
    with tempfile.TemporaryDirectory(prefix="port-kit-") as folder:
        model = assemble(goldens, Path(folder), record)
        with single_rank(DTYPES[word]), torch.inference_mode():
            for name, value in _run(load_pipeline(model), goldens, record["arguments"], exact):
                yield from compare(name, value, exact, rounded, FRAMES if name.endswith("uint8") else EXACT)


def assemble(goldens: Goldens, target: Path, record: Mapping[str, Any]) -> Path:
    """Assemble a model directory from a goldens folder's checkpoint, with the names of the recipe."""
    for source, name in FOLDERS.items():
        shutil.copytree(goldens.checkpoint / source, target / name, copy_function=shutil.copyfile)
    sides = {name: record["arguments"][name] for name in ("height", "width")}
    index = {**RECIPE.model_index, **sides, "boundary_ratio": record["boundary_ratio"]}
    (target / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    return target


def request_of(goldens: Goldens, given: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
    """Return the recorded arguments as a prompt and sampling parameters."""
    from vllm_omni.inputs.data import OmniDiffusionSamplingParams

    prompt = {
        "prompt": given["prompt"],
        "negative_prompt": given["negative_prompt"],
        "multi_modal_data": {"image": [str(goldens.folder / "e2e_media" / "first_frame.png")]},
    }
    names = ("height", "width", "num_frames", "num_inference_steps", "seed")
    return prompt, OmniDiffusionSamplingParams(
        **{name: given[name] for name in names}, guidance_scale=given["cfg_scale"], guidance_scale_provided=True
    )


def _run(
    pipeline: Any, goldens: Goldens, given: Mapping[str, Any], recorded: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Run the pipeline once, from the recorded noise; yield values under the recorded names, in order of the run."""
    pipeline.fps = given["video_fps"]
    prepared = pipeline.prepare(*request_of(goldens, given))
    yield "image.uint8", _to_uint8(prepared.images[0]).permute(1, 2, 0)
    yield "pixels", prepared.images[0][None]
    (state,) = pipeline.begin(prepared)
    conditioning = state.conditioning
    yield "text.positive", conditioning.positive.audio.raw[0]
    yield "text.negative", conditioning.negative.audio.raw[0]
    yield "condition", conditioning.first_frame
    noise = {"video": state.latents["video"], "audio": state.latents["audio"].transpose(1, 2)}
    yield from ((f"{name}.noise", value) for name, value in noise.items())
    state.latents = {"video": recorded["video.noise"], "audio": recorded["audio.noise"].transpose(1, 2)}
    steps: list[StepResult] = []
    branches: list[tuple[Tensor, Tensor]] = []
    pipeline.on_step = steps.append
    predict = pipeline.predict_noise

    def record_branch(**branch: Any) -> tuple[Tensor, Tensor]:
        branches.append(predict(**branch))
        return branches[-1]

    pipeline.predict_noise = record_branch
    while not state.is_done:
        branches.clear()
        pipeline.scheduler_step(state, *pipeline.predict([state]))
        kinds: dict[str, Mapping[str, Tensor]] = {
            name: dict(zip(noise, flows, strict=True))
            for name, flows in zip(("positive", "negative"), branches, strict=False)  # one branch without guidance
        }
        for kind, values in {**kinds, "guided": steps[-1].guided, "latents": steps[-1].latents}.items():
            for name, value in values.items():
                yield f"step{steps[-1].index}.{kind}.{name}", value.transpose(1, 2) if name == "audio" else value
    decoded = pipeline.decode(state)
    yield "video.decoded", decoded["video"]
    yield "video.frames_uint8", _to_uint8(decoded["video"][0]).permute(1, 2, 3, 0)
    yield "audio.wave", decoded["audio"][None, None]


def _to_uint8(pixels: Tensor) -> Tensor:
    """Return pixels in [-1, 1] as whole numbers up to 255, in float."""
    return ((pixels.clamp(-1, 1) + 1) * 127.5).round()
