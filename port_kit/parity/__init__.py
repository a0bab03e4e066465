"""Comparison of a port with its original implementation: golden cases, bounds, differences.

:func:`run_parity` compares a port with goldens. :func:`port_kit.parity.record.record` creates goldens by running the
original implementation in a process of its own. Importing this package imports neither torch nor vLLM.
"""

from port_kit.parity.compare import Bound, Case, CaseReport, Difference, Pair, compare, run_case, run_parity
from port_kit.parity.original import OriginalImplementation

__all__ = [
    "Bound",
    "Case",
    "CaseReport",
    "Difference",
    "OriginalImplementation",
    "Pair",
    "compare",
    "run_case",
    "run_parity",
]
