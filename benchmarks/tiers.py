"""One request at each tier of quality, or on cards of less memory: seconds, peak memory, and how far the latents are.

Every row is a process of its own with the full-size DreamID-Omni and random weights (``end_to_end.py``), or the tiny
one. A row is printed as soon as it is known; the last line is one JSON object. Differences are those of the final
latents from the first tier's, relative L2; ``seconds_for_50_steps`` has the measured phases and 50 times the step.

    python benchmarks/tiers.py --folder MODEL                          # the table of tiers
    python benchmarks/tiers.py --folder MODEL --steps 10 --tier exact --tier fp8
    python benchmarks/tiers.py --folder MODEL --cards                  # cards of 24, 48, 80 and 141 GB
    python benchmarks/tiers.py --folder MODEL --card "80 GB"
    python benchmarks/tiers.py --tiny --tier exact --tier fp8         # on a CPU, which has no attention in eight bits
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import end_to_end

FP8 = {"quantization_config": "fp8"}
FP8_ATTENTION = {**FP8, "diffusion_kv_cache_dtype": "fp8"}
GATE = "guidance_gate_step"
STEPS = 50


@dataclass(frozen=True)
class Row:
    """One row of a table.

    Attributes:
        engine: fields of the engine's configuration.
        gate: part of the steps that run all guidance branches.
        cache: with Cache-DiT at vLLM-Omni's default settings.
        memory_gb: device memory; 0 for all.
        command: options of ``port-kit generate``.
    """

    command: str
    engine: dict[str, Any] = field(default_factory=dict)
    gate: float = 1.0
    cache: bool = False
    memory_gb: float = 0.0


#: Each tier has what the one before has.
TIERS = {
    "exact": Row(""),
    "fp8": Row("--quantization fp8", FP8),
    "fp8_attention": Row("--quantization fp8 --diffusion-kv-cache-dtype fp8", FP8_ATTENTION),
    "guidance_gate": Row(
        "--quantization fp8 --diffusion-kv-cache-dtype fp8 --guidance-gate-step STEPS/2", FP8_ATTENTION, gate=0.5
    ),
    "cache_dit": Row(
        "--quantization fp8 --diffusion-kv-cache-dtype fp8 --guidance-gate-step STEPS/2 --cache-backend cache_dit",
        FP8_ATTENTION,
        gate=0.5,
        cache=True,
    ),
}
_TILING = {"vae_use_tiling": True}
CARDS = {
    "24 GB": Row(
        "--quantization fp8 --enable-cpu-offload --vae-use-tiling",
        {**FP8, **_TILING, "enable_cpu_offload": True},
        memory_gb=24,
    ),
    "24 GB, blocks streamed": Row(
        "--enable-layerwise-offload --vae-use-tiling", {**_TILING, "enable_layerwise_offload": True}, memory_gb=24
    ),
    "48 GB": Row("--quantization fp8 --vae-use-tiling", {**FP8, **_TILING}, memory_gb=48),
    "48 GB, exact": Row("--enable-cpu-offload --vae-use-tiling", {**_TILING, "enable_cpu_offload": True}, memory_gb=48),
    "80 GB": Row("", memory_gb=80),
    "141 GB": Row("", memory_gb=141),
}


def measure(name: str, row: Row, folder: Path, given: argparse.Namespace) -> tuple[dict[str, Any], Any]:
    """Serve the requests of a row; return its figures, and the final latents (None if it does not run)."""
    from port_kit.errors import ParallelError

    options = {GATE: max(1, int(given.steps * row.gate))} if row.gate < 1 else {}
    extra: dict[str, Any] = {"engine": row.engine, "options": options, "few_options": dict.fromkeys(options, 1)}
    try:
        served = end_to_end.serve(folder, given, row.cache, memory_gb=row.memory_gb, **extra)
    except ParallelError as error:
        trace = str(error.details.get("traceback", error))
        return {"name": name, "options": row.command, "failed": trace.strip().splitlines()[-1][:300]}, None
    last = served["requests"][-1]
    step_seconds = [second for second, _ in last["predict"]]
    peaks = [peak for calls in last.values() for _, peak in calls if peak is not None]
    request = last["request"][0][0]
    denoising = sum(step_seconds)
    return {
        "name": name,
        "options": row.command,
        "steps": len(step_seconds),
        "request_seconds": round(request, 3),
        "seconds_for_50_steps": round(request - denoising + STEPS * denoising / len(step_seconds), 2),
        "mean_step_seconds": round(denoising / len(step_seconds), 4),
        "decode_seconds": round(sum(second for second, _ in last["decode_video"]), 3),
        "load_peak_gib": end_to_end.gib(served["load"]["load_weights"][0][1]),
        "peak_gib": end_to_end.gib(max(peaks)),
        "blocks": served["blocks"],
        "device": served["device"],
    }, served["latents"]


def run(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measure the rows that the arguments ask for."""
    end_to_end.write_missing(folder, given)
    cards = given.card or (CARDS if given.cards else ())
    rows = {name: CARDS[name] for name in cards} or {name: TIERS[name] for name in given.tier or TIERS}
    found, exact = [], None
    for name, row in rows.items():
        figures, latents = measure(name, row, folder, given)
        if not cards and latents is not None:
            exact = latents if exact is None else exact
            figures["relative_error"] = end_to_end.errors(latents, exact)
        print(json.dumps(figures), file=sys.stderr, flush=True)
        found.append(figures)
    return {"size": f"{given.height}x{given.width}", "rows": found}


def main() -> None:
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # stdout is for the result
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--folder", type=Path, help="a model directory to keep; used as it is if it is there")
    options.add_argument("--tier", action="append", choices=[*TIERS], help="only this tier; may be given several times")
    options.add_argument("--cards", action="store_true", help="cards of less memory instead of tiers")
    options.add_argument("--card", action="append", choices=[*CARDS], help="only this card; may be given several times")
    options.add_argument("--steps", type=int, help=f"default: {STEPS}, tiny: 4")
    options.add_argument("--size", metavar="HEIGHTxWIDTH", help="default: 704x1024, tiny: 64x64")
    options.add_argument("--tiny", action="store_true", help="the tiny model")
    own = options.parse_args()
    given = end_to_end.build_parser().parse_args(["--rounds", "0", *(["--tiny"] if own.tiny else [])])
    vars(given).update(vars(own))
    if own.size is not None:
        given.height, given.width = map(int, own.size.split("x"))
    given.steps = given.steps or (4 if given.tiny else STEPS)
    end_to_end.add_defaults(given)
    with tempfile.TemporaryDirectory(prefix="port-kit-") as scratch:
        print(json.dumps(run(given, given.folder or Path(scratch) / "model"), indent=1))


if __name__ == "__main__":
    main()
