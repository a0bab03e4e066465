"""Compare tiny pipelines of diffusers on several ranks with one rank, and write a table.

    python benchmarks/autoparallel_pipelines.py [PIPELINE ...] [--layout cfg2 ...] [--plans FOLDER] [--output FOLDER]

Every pipeline runs in a process of its own, with a time limit, on vLLM-Omni's workers; each line of
``pipelines.jsonl`` is one of them. ``tests/autoparallel/test_hosted.py`` runs the same pipelines through ``Omni``.
Layouts other than guidance need a plan: ``FOLDER/CLASS.toml``, by default the shipped ones.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

#: Largest difference relative to the largest value, float32.
TOLERANCE = 2e-5


def measure(name: str, layouts: list[str], plans: Path) -> dict[str, Any]:
    """Return the row of one pipeline; the work of a child process."""
    from port_kit.autoparallel.host.checks import PLAN_KEY
    from port_kit.autoparallel.host.index import PipelineIndex
    from port_kit.autoparallel.tiny_pipelines import CASES, write_pipeline
    from port_kit.autoparallel.verify import compare
    from port_kit.runtime.hosts import host_of
    from port_kit.testing.workers import Request

    with tempfile.TemporaryDirectory(prefix="port-kit-") as folder:
        path = write_pipeline(name, CASES[name], Path(folder) / "model")
        index = PipelineIndex.read(path)
        denoiser = index.components[index.denoisers[0]]
        plan = plans / f"{denoiser}.toml"
        additional = {PLAN_KEY: str(plan)} if plan.is_file() else {}
        config = {"model_class_name": host_of(index.output_type), "additional_config": additional}
        found = list(compare(path, Request(*CASES[name].request()), layouts, config))
    return {
        "pipeline": name,
        "class": denoiser,
        "output": index.output_type,
        "layouts": {comparison.layout: asdict(comparison) for comparison in found},
    }


def run(name: str, layouts: list[str], plans: Path, limit: float) -> dict[str, Any]:
    """Measure one pipeline in a process of its own; return its row, or one with an error."""
    command = [sys.executable, __file__, "--child", "--plans", str(plans), name]
    command += [f"--layout={layout}" for layout in layouts]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    started = time.monotonic()
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=limit)
        lines = [line for line in done.stdout.splitlines() if line.startswith('{"pipeline"')]
        row = json.loads(lines[-1]) if lines else {"pipeline": name, "error": done.stderr.strip()[-2000:]}
    except subprocess.TimeoutExpired:
        row = {"pipeline": name, "error": f"not finished in {limit:.0f} s"}
    return {**row, "seconds": round(time.monotonic() - started, 1)}


def table(rows: list[dict[str, Any]], layouts: list[str]) -> str:
    """Return the rows as a Markdown table."""
    lines = ["| pipeline | transformer | output | " + " | ".join(f"{layout}: difference" for layout in layouts)]
    lines[0] += " | calls of one rank | calls and weights per rank |"
    lines.append("|" + "---|" * (5 + len(layouts)))
    for row in rows:
        if "error" in row:
            lines.append(f"| {row['pipeline']} | | | " + "fails | " * len(layouts) + " | |")
            continue
        found = row["layouts"]
        differences = " | ".join(f"{found[layout]['difference']:.1e}" for layout in layouts)
        single = found[layouts[0]]["single"]
        shares = "; ".join(_shares(found[layout]["ranks"], single) for layout in layouts)
        calls = f"{single['calls']:g} | {shares}"
        lines.append(f"| {row['pipeline']} | {row['class']} | {row['output']} | {differences} | {calls} |")
    return "\n".join(lines) + "\n"


def _shares(ranks: list[dict[str, Any]], single: dict[str, Any]) -> str:
    calls = ", ".join(f"{rank['calls']:g}" for rank in ranks)
    return f"{calls} ({max(rank['weight_bytes'] for rank in ranks) / single['weight_bytes']:.2f})"


def is_equal(row: dict[str, Any]) -> bool:
    """Return True if all layouts of a row equal one rank, and the output is no constant."""
    return "error" not in row and all(
        found["difference"] <= TOLERANCE and found["spread"] > 0.01 for found in row["layouts"].values()
    )


def main() -> int:
    """Run the command line; return 1 if a pipeline differs or fails."""
    from port_kit.autoparallel.shipped import SHIPPED

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("pipelines", nargs="*")
    parser.add_argument("--layout", action="append", dest="layouts", help="default: cfg2")
    parser.add_argument("--plans", type=Path, default=SHIPPED)
    parser.add_argument("--output", type=Path, default=Path("build/pipelines"))
    parser.add_argument("--limit", type=float, default=600.0, help="seconds per pipeline")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    layouts = given.layouts or ["cfg2"]
    if given.child:
        print(json.dumps(measure(given.pipelines[0], layouts, given.plans)), flush=True)
        return 0
    from port_kit.autoparallel.tiny_pipelines import CASES

    given.output.mkdir(parents=True, exist_ok=True)
    rows = []
    with (given.output / "pipelines.jsonl").open("w", encoding="utf-8") as file:
        for name in given.pipelines or CASES:
            rows.append(run(name, layouts, given.plans, given.limit))
            file.write(json.dumps(rows[-1]) + "\n")
            file.flush()
            print(f"{name}: {'equal' if is_equal(rows[-1]) else 'NOT EQUAL'}, {rows[-1]['seconds']} s", flush=True)
    (given.output / "pipelines.md").write_text(table(rows, layouts), encoding="utf-8")
    print(f"{sum(map(is_equal, rows))} of {len(rows)} equal; {given.output / 'pipelines.md'}")
    return 0 if all(map(is_equal, rows)) else 1


if __name__ == "__main__":
    raise SystemExit(main())
