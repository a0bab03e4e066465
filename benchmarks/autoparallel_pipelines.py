"""Compare tiny pipelines of diffusers on several ranks with one rank, through ``Omni``, and write a table.

    python benchmarks/autoparallel_pipelines.py [PIPELINE ...] [--layout cfg2 --layout ulysses2] [--output FOLDER]

Each line of ``pipelines.jsonl`` is one pipeline; a second run measures those that are missing. Plans are the shipped
ones, or are inferred and kept as ``port-kit run`` does. One process runs the pipelines one after the other, since
imports take longer than a pipeline; one that fails, or exceeds the time limit, is recorded, and a new process goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

#: Largest difference relative to the largest value, float32.
TOLERANCE = 2e-5
#: Least standard deviation of an output: a constant one hides every difference.
SPREAD = 0.01
LAYOUTS = ("cfg2", "ulysses2")


def measure(name: str, layouts: list[str]) -> dict[str, Any]:
    """Run a pipeline on one rank and in each layout; return its row."""
    from port_kit.autoparallel.host.index import PipelineIndex
    from port_kit.autoparallel.tiny_pipelines import CASES, write_pipeline
    from port_kit.autoparallel.tiny_pipelines.engine import generate
    from port_kit.parallel.layout import Layout

    case = CASES[name]
    with tempfile.TemporaryDirectory(prefix="port-kit-") as folder:
        index = PipelineIndex.read(write_pipeline(name, case, Path(folder) / "model"))
        started = time.monotonic()
        single = generate(index.folder, case.request(), Layout())
        found = {}
        for layout in map(Layout.parse, layouts):
            plan = _plan(index, layout)
            ranks = generate(index.folder, case.request(), layout, plan)
            found[str(layout)] = {
                "difference": ranks.difference(single),
                **ranks.work,
                "exchanges": _exchanges(ranks.work["exchanges"], plan),
            }
    return {
        "pipeline": name,
        "class": index.components[index.denoisers[0]],
        "inputs": case.inputs,
        "output": index.output_type,
        "shapes": {medium: list(value.shape) for medium, value in single.media.items()},
        "spread": single.spread,
        "calls": single.work["calls"],
        "layouts": found,
        "seconds": round(time.monotonic() - started, 1),
    }


def _plan(index: Any, layout: Any) -> Path | None:
    from port_kit.autoparallel.host.plans import find_plan

    if not set(layout.degrees) - {"cfg"}:
        return None
    return find_plan(index, layout, None, report=lambda line: print(line, file=sys.stderr))


def _exchanges(counts: Mapping[str, int], plan: Path | None) -> list[str]:
    """Return the kinds of exchange that were used; those at linears count no calls."""
    from port_kit.autoparallel.plan import Plan

    at_linears = plan is not None and any(site.at == "linears" for site in Plan.load(plan).attention)
    used = {kind for kind, count in counts.items() if count and kind != "local"}
    return sorted(used | ({"linears"} if at_linears else set()))


def findings(row: Mapping[str, Any]) -> list[str]:
    """Return the faults of a row: outputs differ, or work was not divided."""
    if "error" in row:
        return [row["error"].splitlines()[-1]]
    found = [] if row["spread"] > SPREAD else ["the output is constant"]
    for layout, one in row["layouts"].items():
        if not one["difference"] <= TOLERANCE:
            found.append(f"{layout} differs by {one['difference']:.1e}")
        if "cfg" in layout and not one["calls"] < row["calls"]:
            found.append(f"{layout}: rank 0 computed all branches")
        if "ulysses" in layout and not one["exchanges"]:
            found.append(f"{layout}: nothing was exchanged")
    return found


def read(path: Path) -> dict[str, dict[str, Any]]:
    """Return the rows of a file by pipeline."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return {row["pipeline"]: row for row in map(json.loads, lines)}


def append(path: Path, row: Mapping[str, Any]) -> None:
    """Add a row to a file."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def run(names: list[str], layouts: list[str], path: Path, limit: float) -> None:
    """Measure pipelines in one process until it ends or one of them exceeds the limit; record the error of that one."""
    log = path.with_name(f"{names[0]}.log")
    command = [sys.executable, __file__, "--child", "--output", str(path.parent), *names]
    command += [f"--layout={layout}" for layout in layouts]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with log.open("wb") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)
    rows, since = len(read(path)), time.monotonic()
    try:
        while process.poll() is None and time.monotonic() - since < limit:
            time.sleep(0.5)
            if (count := len(read(path))) > rows:
                rows, since = count, time.monotonic()
    finally:
        ended = process.poll() is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    left = [name for name in names if name not in read(path)]
    if left:
        error = log.read_text(encoding="utf-8", errors="replace").strip()[-3000:] if ended else f"over {limit:.0f} s"
        append(path, {"pipeline": left[0], "error": error})


def table(rows: list[Mapping[str, Any]], layouts: list[str]) -> str:
    """Return the rows as a Markdown table."""
    head = ["pipeline", "input", "output", "branches", *(f"{layout}: difference" for layout in layouts)]
    head += ["calls of one rank", "calls of rank 0, cfg2", "exchanges", "seconds"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        if "error" in row:
            lines.append(f"| `{row['pipeline']}` | " + " | ".join(["fails"] + [""] * (len(head) - 2)) + " |")
            continue
        found = list(row["layouts"].values())
        branches = " and ".join(sorted({form for one in found for form in one["branches"]}))
        differences = [f"{one['difference']:.1e}" if one["difference"] else "0" for one in found]
        calls = next((f"{one['calls']:g}" for layout, one in row["layouts"].items() if "cfg" in layout), "")
        exchanges = ", ".join(sorted({kind for one in found for kind in one["exchanges"]}))
        cells = [f"`{row['pipeline']}`", row["inputs"], row["output"], branches, *differences]
        lines.append("| " + " | ".join([*cells, f"{row['calls']:g}", calls, exchanges, f"{row['seconds']:.0f}"]) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run the command line; return 1 if a pipeline differs or fails."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("pipelines", nargs="*")
    parser.add_argument("--layout", action="append", dest="layouts", help="default: cfg2 and ulysses2")
    parser.add_argument("--output", type=Path, default=Path("build/pipelines"))
    parser.add_argument("--limit", type=float, default=300.0, help="seconds per pipeline")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    layouts, path = given.layouts or list(LAYOUTS), given.output / "pipelines.jsonl"
    if given.child:
        from port_kit.testing.forkserver import fork_workers

        fork_workers()
        for name in given.pipelines:
            append(path, measure(name, layouts))
        return 0
    from port_kit.autoparallel.tiny_pipelines import CASES

    given.output.mkdir(parents=True, exist_ok=True)
    names = given.pipelines or list(CASES)
    while left := [name for name in names if name not in read(path)]:
        run(left, layouts, path, given.limit)
    rows = [read(path)[name] for name in names]
    (given.output / "pipelines.md").write_text(table(rows, layouts), encoding="utf-8")
    for row in rows:
        print(f"{row['pipeline']}: {'; '.join(findings(row)) or 'equal'}")
    equal = sum(not findings(row) for row in rows)
    print(f"{equal} of {len(rows)} equal; {given.output / 'pipelines.md'}")
    return 0 if equal == len(rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
