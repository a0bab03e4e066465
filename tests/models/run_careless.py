"""A careless user's script: lists with refused requests, LoRAs, damaged directories and a closed engine, with ``Omni``.

Usage: run_careless.py MODEL FOLDER REPORT   with the adapters ``a``, ``b`` and ``wide`` (.safetensors) in the folder.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any


def digest(result: Any) -> str:
    """Return a digest of frames and samples."""
    import numpy as np

    parts = [np.ascontiguousarray(part) for part in (result.images[0], result.multimodal_output["audio"])]
    return hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()


def error_of(call: Any, *arguments: Any, **options: Any) -> dict[str, Any]:
    """Return the error of a call."""
    try:
        call(*arguments, **options)
    except Exception as error:
        return {"kind": type(error).__name__, "text": str(error), "status": getattr(error, "status_code", None)}
    return {}


def requests_with_adapters(omni: Any, folder: Path) -> dict[str, Any]:
    """Send the adapters under one number, before and after one of a larger rank."""
    from vllm_omni.inputs.data import OmniDiffusionSamplingParams
    from vllm_omni.lora.request import LoRARequest

    def ask(name: str, **options: Any) -> str:
        adapter = LoRARequest("style", 77, str(folder / f"{name}.safetensors"))
        sampling = OmniDiffusionSamplingParams(num_inference_steps=1, seed=1, lora_request=adapter, **options)
        return digest(omni.generate("rain", sampling)[0])

    found: dict[str, Any] = {name: ask(name) for name in ("a", "b", "wide")}
    found["a again"] = ask("a")
    for name, options in {"missing": {}, "damaged": {}, "a": {"lora_scale": 1e308}}.items():
        found[f"error {name}"] = error_of(ask, name, **options)
    found["a after errors"] = ask("a")
    return found


def run(model: Path, folder: Path) -> dict[str, Any]:
    """Use one engine carelessly."""
    from vllm_omni import Omni
    from vllm_omni.inputs.data import OmniDiffusionSamplingParams

    omni = Omni(model=str(model), dtype="float32", enforce_eager=True)
    sampling = OmniDiffusionSamplingParams(num_inference_steps=1, seed=1)
    found: dict[str, Any] = {}
    try:
        prompts = ["rain", {"prompt": ""}, "snow", {"prompt": "x", "multi_modal_data": {"image": "none.png"}}]
        try:
            omni.generate(prompts, sampling)
        except Exception as error:
            found["list"] = {"kind": type(error).__name__, "text": str(error)}
            found["results"] = {index: digest(result) for index, result in getattr(error, "results", {}).items()}
            found["refused"] = {index: str(one) for index, one in getattr(error, "refused", {}).items()}
        found["alone"] = {
            0: digest(omni.generate("rain", sampling)[0]),
            2: digest(omni.generate(["snow"], sampling)[0]),
        }
        found["one"] = error_of(omni.generate, {"prompt": ""}, sampling)
        found |= requests_with_adapters(omni, folder)
    finally:
        omni.close()
    found["closed"] = error_of(omni.generate, "rain", sampling)
    return found


def start_damaged(model: Path, folder: Path) -> dict[str, Any]:
    """Start an engine on damaged copies of a model directory."""
    from vllm_omni import Omni

    found = {}
    for what in ("tokenizer", "area", "index"):
        copy = folder / f"damaged_{what}"
        shutil.copytree(model, copy)
        index = copy / "model_index.json"
        if what == "tokenizer":
            shutil.rmtree(copy / "tokenizer")
        elif what == "area":
            index.write_text(json.dumps(json.loads(index.read_text()) | {"video_area": -5}))
        else:
            index.write_text(index.read_text()[:60])
        found[what] = error_of(Omni, model=str(copy), dtype="float32", enforce_eager=True)
    return found


if __name__ == "__main__":
    model, folder, report = map(Path, sys.argv[1:])
    found = {**run(model, folder), "damaged": start_damaged(model, folder)}
    report.write_text(json.dumps(found, indent=1))
