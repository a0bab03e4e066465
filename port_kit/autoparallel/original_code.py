"""Import of modules of original code without the rest of their package."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

from port_kit.errors import ParallelError
from port_kit.escape import quoted


def bare_packages(*names: str) -> None:
    """Register packages without running their ``__init__``, for this process; their modules can be imported then.

    An ``__init__`` often imports pipelines, encoders and data sets, and so needs packages that the module does not.

    Args:
        names: dotted names of importable packages, outer ones first.

    Raises:
        ParallelError: ``plan_subject``; a package is not found.
    """
    for name in names:
        if name in sys.modules:
            continue
        parent = name.rpartition(".")[0]
        spec = importlib.util.find_spec(name) if not parent or parent in sys.modules else None
        if spec is None or spec.submodule_search_locations is None:
            raise ParallelError(
                f"no package {quoted(name)}: not found on the import path, or its parent is not registered",
                code="plan_subject",
                hint="put the checkout on the import path: PYTHONPATH=CHECKOUT port-kit plan infer MODULE:FUNCTION",
            )
        package = ModuleType(name)
        package.__path__ = list(spec.submodule_search_locations)
        package.__spec__ = spec
        sys.modules[name] = package
