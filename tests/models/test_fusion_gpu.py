"""The fusion transformer on a GPU against recorded branches of the original.

In bfloat16 the distance to the original's float32 may be 1.2 times that of the original's own bfloat16.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from port_kit.models.wan.parity import transformer_cases
from port_kit.parity import CaseReport, run_case
from tests.models.test_fusion_goldens import CASES

FACTOR = 1.2


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", CASES)
def test_a_pass_on_a_gpu_is_the_original_s(
    name: str, dtype: str, goldens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformer_cases, "BF16_FACTOR", FACTOR)
    (case,) = [case for case in transformer_cases.cases(goldens, "cuda") if case.name == f"fusion/{name} {dtype}"]
    report = run_case(case)
    print(f"\n{report.name}: {worst(report)}")
    assert report.ok, (report.first_divergence, report.to_json())


def worst(report: CaseReport) -> str:
    """Say how far the worst pair is, as a part of its bound."""
    share, name = max(
        (
            (difference.rel_l2 / difference.bound.rel_l2, difference.name)
            if difference.bound.rel_l2
            else (difference.max_abs / (difference.bound.max_abs or 1.0), difference.name)
        )
        for difference in report.differences
    )
    return f"{share:.2f} of the bound ({name})"
