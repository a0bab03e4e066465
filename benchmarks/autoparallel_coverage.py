"""Coverage of plans inferred for the transformer classes of diffusers.

Each class runs in a forked process with a time limit: its plan is inferred, then proven for each layout. Results are
JSON lines, one per class, appended as they arrive; a run that was interrupted continues with the classes that are
missing. ``--report`` writes a Markdown table of the results.

    nice python benchmarks/autoparallel_coverage.py --output build/autoparallel.jsonl
    nice python benchmarks/autoparallel_coverage.py --output build/autoparallel.jsonl FluxTransformer2DModel --again
    python benchmarks/autoparallel_coverage.py --output build/autoparallel.jsonl --report docs/autoparallel_coverage.md
"""

from __future__ import annotations

import argparse
import json
import logging
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from port_kit.autoparallel.diffusers_cases import CASES
from port_kit.errors import PortKitError

#: Layouts of 2 ranks, and combinations of 4.
LAYOUTS = ("ulysses2", "ring2", "tp2", "hsdp2", "cfg2", "ulysses4", "tp2xulysses2", "hsdp2xcfg2", "cache_dit")
#: Goals of the project per column of the table.
GOALS = {"ulysses2": 56, "ring2": 48, "tp2": 56, "hsdp2": 60, "cache_dit": 45}
#: Largest part of the bytes of blocks per rank that counts as tensor parallelism over two ranks.
BLOCK_BYTES = 0.6


def main() -> None:
    """Run the missing classes, then write the report."""
    options = _parser().parse_args()
    known = read(options.output)
    wanted = options.classes or sorted(CASES)
    missing = [name for name in wanted if options.again or name not in known]
    if missing and not options.report:
        cover(missing, options)
    records = read(options.output)
    if options.report:
        options.report.write_text(markdown(records), encoding="utf-8")
    print(summary(records))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("classes", nargs="*", help="class names; default: all")
    parser.add_argument("--output", type=Path, required=True, help="JSON lines")
    parser.add_argument("--plans", type=Path, help="folder for the plan files")
    parser.add_argument("--layout", dest="layouts", action="append", help="default: " + ", ".join(LAYOUTS))
    parser.add_argument("--limit", type=float, default=600.0, help="seconds per class")
    parser.add_argument("--again", action="store_true", help="run classes that have results")
    parser.add_argument("--report", type=Path, help="write a Markdown table, and run nothing")
    return parser


def cover(names: Sequence[str], options: argparse.Namespace) -> None:
    """Run classes one after the other, each in a process that inherits the imports of this one."""
    import torch

    from port_kit.testing.workers import run_ranks, warm_up

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    warm_up()
    for name in names:
        started = time.monotonic()
        try:
            (record,) = run_ranks(1, lambda _rank, name=name: cover_class(name, options), timeout=options.limit)
        except PortKitError as error:
            record = {"error": str(error).strip().splitlines()[0], "results": []}
        record |= {"class": name, "seconds": round(time.monotonic() - started, 1)}
        with options.output.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(record) + "\n")
        print(f"{name:<42} {line(record)}", flush=True)


def cover_class(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Infer and prove the plan of one class."""
    from port_kit.autoparallel.infer import infer_plan
    from port_kit.autoparallel.prove import prove_plan

    subject = CASES[name]()
    started = time.monotonic()
    plan = infer_plan(subject)
    inferred = time.monotonic()
    if options.plans:
        options.plans.mkdir(parents=True, exist_ok=True)
        (options.plans / f"{name}.toml").write_text(plan.to_toml(), encoding="utf-8")
    results = prove_plan(subject, plan, options.layouts or LAYOUTS)
    return {
        "error": "",
        "inference_seconds": round(inferred - started, 1),
        "refused": {refusal.kind: refusal.reason for refusal in plan.refused},
        "whole": {whole.module: whole.reason for whole in plan.whole},
        "attention": dict(Counter(site.at for site in plan.attention)),
        "cache": {blocks.modules: blocks.cache_pattern for blocks in plan.blocks if blocks.cache_pattern},
        "cache_findings": {blocks.modules: blocks.cache_reason for blocks in plan.blocks if blocks.cache_reason},
        "lists": [blocks.modules for blocks in plan.blocks],
        "results": [result.to_json() for result in results],
    }


def read(path: Path) -> dict[str, dict[str, Any]]:
    """Return the last record of each class."""
    if not path.exists():
        return {}
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return {record["class"]: record for record in lines}


def by_layout(record: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return the results of a record by layout."""
    return {result["layout"]: result for result in record["results"]}


def line(record: Mapping[str, Any]) -> str:
    """Return one line for the progress of a run."""
    if record["error"]:
        return f"ERROR {record['error'][:150]} ({record['seconds']} s)"
    cells = [f"{name} {_cell(record, result)}" for name, result in by_layout(record).items()]
    return f"{', '.join(cells)} ({record['seconds']} s)"


def counts(record: Mapping[str, Any]) -> set[str]:
    """Return the goals that a class meets."""
    found = {name for name, result in by_layout(record).items() if result["proven"]}
    if not any("ring" in kind for kind in by_layout(record).get("ring2", {}).get("exchanges", ())):
        found.discard("ring2")  # masks were exchanged by heads over the same ranks
    tensor = by_layout(record).get("tp2", {}).get("block_bytes")
    if tensor is None or tensor > BLOCK_BYTES:
        found.discard("tp2")
    return found


def summary(records: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the number of classes that meet each goal."""
    met = Counter(goal for record in records.values() for goal in counts(record))
    columns = dict.fromkeys([*GOALS, *LAYOUTS])
    parts = [f"{name} {met[name]}" + (f" (goal {GOALS[name]})" if name in GOALS else "") for name in columns]
    return f"{len(records)} classes: {', '.join(parts)}"


def markdown(records: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the table of all classes."""
    layouts = list(dict.fromkeys(name for record in records.values() for name in by_layout(record)))
    head = ["class", *layouts, "modules on all tokens"]
    rows = [head, ["---"] * len(head), *(_row(name, records[name], layouts) for name in sorted(records))]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"{summary(records)}\n\n{table}\n"


def _row(name: str, record: Mapping[str, Any], layouts: Iterable[str]) -> list[str]:
    results = by_layout(record)
    cells = [_cell(record, results[layout]) if layout in results else "error" for layout in layouts]
    return [name, *cells, ", ".join(f"`{path}`" for path in record.get("whole", ()))]


def _cell(record: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    """Return the part of the work per rank of a proven layout (tokens, bytes of blocks), or the cache patterns."""
    if not result["proven"]:
        return "refused" if result["reason"].startswith("refused") else "no"
    kinds = result["layout"]
    shares = []
    if any(kind in kinds for kind in ("ulysses", "ring", "allgather")) and result["tokens"] is not None:
        shares.append(f"{result['tokens']:.2f}")
    if kinds.startswith("cache_dit"):
        shares.append(", ".join(dict.fromkeys(pattern[-1] for pattern in record["cache"].values())))
    if any(kind in kinds for kind in ("tp", "hsdp")) and result["block_bytes"] is not None:
        shares.append(f"{result['block_bytes']:.2f}")
    return " / ".join(shares) or "yes"


if __name__ == "__main__":
    main()
