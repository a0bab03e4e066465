"""Parallel plans of transformer classes of diffusers: shipped, or to be inferred; read without importing torch."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path
from typing import Literal

#: shipped: the kit has the file; inferred: the kit has a tiny configuration to infer it from; none: neither.
PlanOrigin = Literal["shipped", "inferred", "none"]
_FACTS: dict[PlanOrigin, str] = {
    "shipped": "has a shipped parallel plan",
    "inferred": "has no shipped parallel plan; port-kit new and port-kit run infer and prove one",
    "none": "has no parallel plan, and no tiny configuration to infer one from: guidance parallelism only",
}
_FOLDER = Path(__file__).parents[1] / "autoparallel"
#: Folder of the shipped plans.
PLANS = _FOLDER / "plans"


def plan_origin(class_name: str) -> PlanOrigin:
    """Return the origin of the plan of a class."""
    if (PLANS / f"{class_name}.toml").is_file():
        return "shipped"
    return "inferred" if class_name in _cases() else "none"


def describe_plan(class_name: str) -> str:
    """Return the fact about the plan of a class, in words."""
    return f"{class_name} {_FACTS[plan_origin(class_name)]}"


@cache
def _cases() -> frozenset[str]:
    """Return the classes with a tiny configuration: the keys of ``CASES`` in the modules of the cases."""
    found: set[str] = set()
    for path in sorted((_FOLDER / "diffusers_cases").glob("*.py")):
        for node in ast.parse(path.read_bytes()).body:
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
                if any(isinstance(target, ast.Name) and target.id == "CASES" for target in node.targets):
                    found |= {str(key.value) for key in node.value.keys if isinstance(key, ast.Constant)}
    return frozenset(found)
