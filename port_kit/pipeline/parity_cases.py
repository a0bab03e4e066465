"""Golden cases of what :mod:`port_kit.parity.run_modules` recorded: components with their modules, and the pipeline."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from port_kit.parity import Bound, Case, Pair
from port_kit.parity.hooks import outputs_of
from port_kit.pipeline.loading import load_pipeline, read_json
from port_kit.registry import port_of_class
from port_kit.runtime.single_process import single_rank

BOUND = Bound(max_abs=1e-4, rel_l2=2e-5, why="float32, sums in another order")


def recorded_cases(goldens: Path, *, bound: Bound = BOUND) -> Iterator[Case]:
    """List the cases of a goldens folder.

    Args:
        goldens: recorded by :mod:`port_kit.parity.run_modules` in fp32.
        bound: of every tensor.
    """
    contents = json.loads((goldens / "SET.json").read_text(encoding="utf-8"))
    model = Path(contents["model"])
    for name, recorded in contents["components"].items():
        run = partial(_component, model, goldens / name, recorded["inputs"], recorded["modules"], bound)
        yield Case(f"{name} fp32", run)
    if "pipeline" in contents:
        yield Case("pipeline fp32", partial(_pipeline, model, goldens / "pipeline", contents["pipeline"], bound))


def _component(
    model: Path, folder: Path, inputs: Sequence[str], pairs: Mapping[str, str], bound: Bound
) -> Iterable[Pair]:
    """Run a component on the recorded inputs; compare the outputs of its modules, then its own."""
    given, recorded = load_file(folder / "inputs.safetensors"), load_file(folder / "intermediates_fp32.safetensors")
    with single_rank(torch.float32), torch.inference_mode():
        module = load_pipeline(model).get_submodule(folder.name)
        with outputs_of(module, pairs.values()) as found:
            result = module(*(given[name] for name in inputs))
    for name, own in pairs.items():
        yield Pair(name, found[own], recorded[name], bound)
    yield Pair("output", result, load_file(folder / "outputs_fp32.safetensors")["output"], bound)


def _pipeline(model: Path, folder: Path, values: Mapping[str, Any], bound: Bound) -> Iterable[Pair]:
    """Run the steps of a request from the recorded noise, and compare the decoded output."""
    from vllm_omni.inputs.data import OmniDiffusionSamplingParams

    port = port_of_class(read_json(model, "model_index.json")["_class_name"])
    tensors = load_file(folder / "inputs.safetensors")
    sampling = OmniDiffusionSamplingParams(
        num_inference_steps=values["steps"], guidance_scale=values["guidance_scale"], guidance_scale_provided=True
    )
    prompt = {"prompt": values["prompt"], "negative_prompt": values.get("negative_prompt", "")}
    if "image" in tensors:
        prompt["multi_modal_data"] = {"image": [tensors["image"].byte().numpy()]}
    with single_rank(torch.float32), torch.inference_mode():
        pipeline = load_pipeline(model)
        pipeline.initial_latents = lambda _prepared: {port.output_type: tensors["noise"]}
        (state,) = pipeline.begin(pipeline.prepare(prompt, sampling))
        while not state.is_done:
            (guided,) = pipeline.predict([state])
            pipeline.scheduler_step(state, guided)
        latents: Tensor = state.latents[port.output_type]
        result = latents if values["returns"] == "latents" else pipeline.decode(state)[port.output_type]
    yield Pair("output", result, load_file(folder / "outputs_fp32.safetensors")["output"], bound)
