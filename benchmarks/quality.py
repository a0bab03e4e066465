"""Scores against speed of the trained tiny Ovi: every row generates clips through vLLM-Omni's engine and scores them.

The model knows the world of ``benchmarks/tiny_world``, so that each clip is measured against the words of its prompt.
A row is a set of options. Rows with the same options of the engine share one engine, which has a process of its own.
Each row is printed on stderr as soon as it is known; stdout gets one JSON object. A row that this machine refuses has
``failed`` with the reason. ``seconds`` and ``denoise_seconds`` are medians of a clip after a warm-up clip, ``reuse`` is
the share of block calls that Cache-DiT skipped, ``peak_gib`` the memory that the device's allocator reserved in a
request, ``difference`` the mean difference of the frames from those of the row ``exact`` in grey levels; with a LoRA,
from those of the same prompts without it. Cache-DiT, offload and LoRA run without CUDA graphs; ``--eager`` compares
them with a row ``exact`` that has none either.

    python benchmarks/quality.py                                                    # all rows, on a GPU
    python benchmarks/quality.py --folder MODEL --row exact --row "cache_dit 0.12" --prompts 50
    python benchmarks/quality.py --row lora --lora results/lora                     # of benchmarks/tiny_world/train.py
    OMP_NUM_THREADS=1 python benchmarks/quality.py --row exact --prompts 2          # a CPU
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.tiny_world.served import EXACT, Job, Request  # noqa: E402

STEPS = 25
#: The port's guidance scales of the video and of the audio.
SCALES = {"video_guidance_scale": 4.0, "audio_guidance_scale": 3.0}


@dataclass(frozen=True)
class Row:
    """Options of a row.

    Attributes:
        engine: arguments of ``Omni``.
        ranks: processes of the engine.
        steps: of the denoising; 0 for those of the command.
        guidance: factor of both guidance scales.
        gate: part of the steps that run all guidance branches.
        lora: with the LoRA of the command.
        trained: False for random weights.
    """

    engine: dict[str, Any] = field(default_factory=dict)
    ranks: int = 1
    steps: int = 0
    guidance: float = 1.0
    gate: float = 1.0
    lora: bool = False
    trained: bool = True


def _cache(**settings: float) -> Row:
    return Row({"cache_backend": "cache_dit", "cache_config": settings})


ROWS = {
    EXACT: Row(),
    "50 steps": Row(steps=50),
    "10 steps": Row(steps=10),
    "guidance x0.25": Row(guidance=0.25),
    "guidance x0.5": Row(guidance=0.5),
    "guidance x1.5": Row(guidance=1.5),
    "guidance gate": Row(gate=0.5),
    "cache_dit": _cache(),  # 0.24; larger ones skip no more blocks, since the number of steps in a row is limited
    "cache_dit 0.12": _cache(residual_diff_threshold=0.12),
    "cache_dit 0.05": _cache(residual_diff_threshold=0.05),
    "fp8": Row({"quantization": "fp8"}),
    "layerwise offload": Row({"enable_layerwise_offload": True}),
    "tp2": Row({"tensor_parallel_size": 2}, ranks=2),
    "ulysses2": Row({"ulysses_degree": 2}, ranks=2),
    "ring2": Row({"ring_degree": 2}, ranks=2),
    "random weights": Row(trained=False),
    "lora": Row(lora=True),
}


def request_of(name: str, row: Row, given: argparse.Namespace) -> Request:
    """Return what the requests of a row set."""
    steps = row.steps or given.steps
    options: dict[str, Any] = {}
    if row.guidance != 1:
        options |= {scale: value * row.guidance for scale, value in SCALES.items()}
    if row.gate < 1:
        options["guidance_gate_step"] = max(1, int(steps * row.gate))
    return Request(name, steps, options, str(given.lora.resolve()) if row.lora else "")


def plan(given: argparse.Namespace, models: dict[bool, Path], frames: Path) -> list[Job]:
    """Return a job per engine; that of the exact row is the first, and rows keep their order within an engine.

    The row with a LoRA is the last of its engine, whose layers it changes for good.
    """
    common = {"dtype": given.dtype, "enforce_eager": given.eager}
    groups: dict[str, Job] = {}
    for name in chosen(given):
        row = ROWS[name]
        if row.lora and given.lora is None:
            continue
        engine = {"model": str(models[row.trained]), **common, **row.engine}
        job = Job(engine, row.ranks, [], given.prompts, given.warm_up, str(frames))
        job = groups.setdefault(json.dumps(engine, sort_keys=True), job)
        job.rows.append(asdict(request_of(name, row, given)))
    return list(groups.values())


def chosen(given: argparse.Namespace) -> list[str]:
    """Return the names of the rows in the order of :data:`ROWS`."""
    return [name for name in ROWS if not given.row or name in given.row]


def serve(job: Job, scratch: Path, timeout: float) -> Iterator[dict[str, Any]]:
    """Run a job in a process of its own; yield its rows, also those that the process did not get to."""
    file, log = scratch / "job.json", scratch / "log.txt"
    file.write_text(json.dumps(asdict(job)), encoding="utf-8")
    pending, failed = [row["name"] for row in job.rows], False
    source, target = os.pipe()
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-m", "benchmarks.tiny_world.served", str(file), str(target)]
    with log.open("w") as output:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=output, pass_fds=[target], start_new_session=True
        )
    os.close(target)
    timer = threading.Timer(timeout, os.killpg, [process.pid, signal.SIGKILL])
    timer.start()
    try:
        with os.fdopen(source, encoding="utf-8") as lines:
            for line in lines:
                found = json.loads(line)
                pending.remove(found["name"])
                failed = failed or "failed" in found
                yield found
        process.wait()
    finally:
        timer.cancel()
    text = log.read_text(encoding="utf-8", errors="replace").strip()
    if pending or failed:
        print(text[-4000:], file=sys.stderr, flush=True)
    last = text.splitlines()[-1][:300] if text else ""
    for name in pending:
        yield {"name": name, "failed": f"the engine's process ended with exit code {process.returncode}: {last}"}


def complete(found: dict[str, Any], exact: dict[str, Any] | None) -> dict[str, Any]:
    """Add the speed relative to the exact row."""
    if exact is None or "failed" in found or found is exact:
        return found
    speeds = {"speed": "seconds", "denoise_speed": "denoise_seconds"}
    return found | {
        name: round(exact[key] / found[key], 3) for name, key in speeds.items() if key in found and key in exact
    }


def run(given: argparse.Namespace, folder: Path, scratch: Path) -> dict[str, Any]:
    """Measure the rows that the arguments ask for."""
    from benchmarks.tiny_world.untrained import write_model

    names = chosen(given)
    models = {True: folder, False: scratch / "random"}
    for trained in {ROWS[name].trained for name in names}:
        write_model(models[trained], trained=trained)
    frames = scratch / "frames"
    frames.mkdir()
    rows: list[dict[str, Any]] = []
    if "lora" in names and given.lora is None:
        rows.append({"name": "lora", "failed": "no LoRA was given: --lora FOLDER"})
    exact = None
    for job in plan(given, models, frames):
        for found in serve(job, scratch, given.timeout):
            if found["name"] == EXACT and "failed" not in found:
                exact = found
            rows.append(complete(found, exact))
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    order = list(ROWS)
    return {**facts(given), "rows": sorted(rows, key=lambda row: order.index(row["name"]))}


def facts(given: argparse.Namespace) -> dict[str, Any]:
    """Return what all rows share."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {"device": device, "torch": torch.__version__, "dtype": given.dtype, "compiled": not given.eager}


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--folder", type=Path, help="the trained model's directory to keep; used if it is there")
    options.add_argument("--row", action="append", choices=[*ROWS], help="only this row; may be given several times")
    options.add_argument("--prompts", type=int, default=100, help="clips per row, 20 at most with a LoRA")
    options.add_argument("--steps", type=int, default=STEPS, help="of rows without a number of their own")
    options.add_argument("--warm-up", type=int, default=1, help="clips before those of a row")
    options.add_argument("--lora", type=Path, metavar="FOLDER", help="PEFT folder of the new colour, for the row lora")
    options.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16, on a CPU float32")
    options.add_argument("--eager", action="store_true", help="no CUDA graphs; always so on a CPU")
    options.add_argument("--timeout", type=float, default=7200.0, help="seconds for the rows of one engine")
    return options


def main() -> None:
    """Parse the options, measure, and print the result."""
    import torch

    given = build_parser().parse_args()
    on_gpu = torch.cuda.is_available()
    given.dtype = given.dtype or ("bfloat16" if on_gpu else "float32")
    given.eager = given.eager or not on_gpu
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    with tempfile.TemporaryDirectory(prefix="port-kit-") as scratch:
        print(json.dumps(run(given, given.folder or Path(scratch) / "model", Path(scratch)), indent=1))


if __name__ == "__main__":
    main()
