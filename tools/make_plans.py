"""Make the shipped plans: infer and prove them, and write ``port_kit/autoparallel/plans/CLASS.toml``.

python tools/make_plans.py FluxTransformer2DModel WanTransformer3DModel    # these classes
python tools/make_plans.py --all                                           # every class with a case
python tools/make_plans.py --check                                         # exit code 1 if a plan is stale
"""

from __future__ import annotations

import argparse
from pathlib import Path

from port_kit.autoparallel.diffusers_cases import CASES
from port_kit.autoparallel.plan import Plan
from port_kit.autoparallel.prove import DEFAULT_LAYOUTS
from port_kit.autoparallel.shipped import SHIPPED, check_fresh, make_plan
from port_kit.errors import ParallelError


def check(folder: Path) -> list[str]:
    """Return a line for each plan of a folder that is stale or cannot be read."""
    problems = []
    for path in sorted(folder.glob("*.toml")):
        try:
            check_fresh(Plan.load(path), path.name)
        except ParallelError as error:
            problems.append(f"{error.message} [{error.code}]")
    return problems


def main() -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("classes", nargs="*")
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--layout", action="append", dest="layouts", help="default: those of port-kit plan prove")
    parser.add_argument("--output", type=Path, default=SHIPPED)
    given = parser.parse_args()
    if given.check:
        problems = check(given.output)
        print("\n".join(problems) or "all plans are fresh")
        return 1 if problems else 0
    failed = 0
    for name in sorted(CASES) if given.all else given.classes:
        try:
            make_plan(name, given.layouts or DEFAULT_LAYOUTS, given.output, report=print)
        except ParallelError as error:
            failed += 1
            print(f"{name}: no plan: {error.message} [{error.code}]", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
