"""A server's use of one engine in step execution: requests at the same time, one given up, several videos, a LoRA.

Usage: run_options.py MODEL LORA MORE SUM WRONG_LORA REPORT, with SUM = 2 LORA + 0.5 MORE. The report is one JSON
object with the result of each request.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from port_kit.runtime.lora_sets import write_set


def summary(result: Any) -> dict[str, Any]:
    """Sums of each video and of each audio."""
    audios = np.asarray(result.multimodal_output["audio"], dtype=np.float64)
    return {
        "shape": [list(np.asarray(video).shape) for video in result.images],
        "video": [int(np.asarray(video).astype(np.int64).sum()) for video in result.images],
        "audio": [float(np.abs(audio).sum()) for audio in audios.reshape(len(result.images), -1)],
    }


async def ask(engine: Any, name: str, lora: str = "", **sampling: Any) -> dict[str, Any]:
    """Send one request and return its result."""
    from vllm_omni.errors import OmniClientError
    from vllm_omni.inputs.data import OmniDiffusionSamplingParams
    from vllm_omni.lora.request import LoRARequest
    from vllm_omni.lora.utils import stable_lora_int_id

    fields = {"num_inference_steps": 2, "seed": 3, **sampling}
    if lora:
        fields["lora_request"] = LoRARequest(Path(lora).stem, stable_lora_int_id(lora), lora)
    params = [OmniDiffusionSamplingParams(**fields)]
    prompt = {"prompt": "rain on a roof"}
    try:
        results = [result async for result in engine.generate(prompt, request_id=name, sampling_params_list=params)]
    except OmniClientError as error:
        return {"error": str(error), "status": error.status_code}
    return {**summary(results[-1]), "ended": time.monotonic()}


async def session(engine: Any, lora: str, more: str, total: str, wrong: str) -> dict[str, Any]:
    """Run the requests in turn; those of ``gather`` at the same time."""
    found = {"alone": await ask(engine, "alone")}
    given_up = asyncio.create_task(ask(engine, "given up", num_inference_steps=900, seed=5))
    first, second = await asyncio.gather(ask(engine, "first"), ask(engine, "second", num_inference_steps=4, seed=4))
    found |= {"first": first, "second": second, "still running": {"yes": not given_up.done()}}
    await engine.abort("given up")
    given_up.cancel()
    await asyncio.gather(given_up, return_exceptions=True)
    found["no steps named"] = await ask(engine, "bad", num_inference_steps=0)
    found["two"] = await ask(engine, "two", num_outputs_per_prompt=2)
    found["next seed"] = await ask(engine, "next seed", seed=4)
    found["lora"] = await ask(engine, "lora", lora=lora)
    found["more"] = await ask(engine, "more", lora=more)
    found["set"] = await ask(engine, "set", lora=str(write_set([(lora, 2.0), (more, 0.5)])))
    found["sum"] = await ask(engine, "sum", lora=total)
    found["wrong lora"] = await ask(engine, "wrong lora", lora=wrong)
    found["again"] = await ask(engine, "again")
    return found


def main(model: str, *loras: str, report: str) -> None:
    """Start the engine, run the session, stop it."""
    from vllm_omni import AsyncOmni

    engine = AsyncOmni(
        model=model,
        dtype="float32",
        enforce_eager=True,
        step_execution=True,
        max_num_seqs=3,
        enable_prompt_embed_cache=True,
    )
    try:
        found = asyncio.run(session(engine, *loras))
    finally:
        engine.shutdown()
    Path(report).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:-1], report=sys.argv[-1])
