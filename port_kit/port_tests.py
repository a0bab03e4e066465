"""Checks that the tests of every port share; ``port-kit new`` writes tests that call them.

Each takes the ``PORT`` of the tests and a tiny model directory or a folder for one, and raises ``AssertionError`` with
a report. They run on a CPU.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from port_kit.checkpoint.configuration import read_config
from port_kit.manifest import Manifest
from port_kit.parallel.verify import port_test_case, tiny_request, verify_parallel
from port_kit.parity import run_parity
from port_kit.parity.record import Settings, record
from port_kit.port import Port, resolve
from port_kit.registry import list_ports
from port_kit.runtime.component_config import component_config
from port_kit.runtime.target_cache import build_manifest
from port_kit.testing.rules import assert_covers, assert_mutations_caught, assert_round_trip
from port_kit.testing.workers import Request, run_workers

_SUGGEST = "port-kit rules suggest --port {0} --component {1} --source {2} -o {3}"
#: Steps of a request with a cache; it must have passed its warm-up.
_CACHE_STEPS = 8
_SECONDS = 600
_forwards: Counter[str] = Counter()


def assert_rules_cover(port: Port, name: str, checkpoint: Path) -> None:
    """Assert that the rules of a component use or drop every tensor of a checkpoint, and fill every parameter once.

    Args:
        port: has the component.
        name: of the component.
        checkpoint: the listed tensors (``.json``) of the full size, or the component's folder in a model directory.
    """
    component = port.component(name)
    rules: Any = resolve(component.rules)
    is_listed = checkpoint.suffix == ".json"
    command = _SUGGEST.format(port.name, name, checkpoint, checkpoint.with_suffix(".toml"))
    assert len(rules), f"{name} has no rules yet: write model/{name}.py, then: {command}"
    config = component_config(component) if is_listed else read_config(checkpoint)
    source = Manifest.from_json(checkpoint) if is_listed else Manifest.from_safetensors(checkpoint)
    plan = assert_covers(rules, source, build_manifest(component, config))
    assert_round_trip(plan)
    assert_mutations_caught(plan)


def assert_matches_original(port: Port, model: Path, code: Path, folder: Path) -> None:
    """Assert that the components and the pipeline compute what the original code computes, in a process of its own.

    Args:
        port: declares its original.
        model: a tiny model directory.
        code: folder that makes the original code importable.
        folder: for the goldens.
    """
    list_ports.cache_clear()
    goldens = record(port, model, folder / "goldens", Settings(device="cpu", code=code)).goldens
    reports = list(run_parity(port, goldens))
    assert len(reports) >= 2, "expected a case for each component, found one"
    for report in reports:
        assert report.ok, report.to_json()


def assert_ranks_agree(port: Port, folder: Path, layouts: Sequence[str]) -> None:
    """Assert that the ranks of each layout return the output of one rank, and divide its work."""
    list_ports.cache_clear()
    for report in verify_parallel(port_test_case(port, folder), layouts):
        assert report.ok, report.describe()


def assert_cache_saves_blocks(port: Port, model: Path) -> None:
    """Assert that Cache-DiT with a threshold of zero changes nothing, and computes fewer blocks with a high one."""
    list_ports.cache_clear()
    plain, all_blocks = _run_with_cache(port, model, None)
    exact, as_many = _run_with_cache(port, model, 0.0)
    _, fewer = _run_with_cache(port, model, 100.0)
    tolerance = 1 if plain.dtype == torch.uint8 else 1e-5
    difference = (plain.double() - exact.double()).abs().max().item()
    assert difference <= tolerance, f"the cache changes the output by {difference}, although its threshold is zero"
    assert as_many == all_blocks, f"{as_many} of {all_blocks} blocks are computed, although the threshold is zero"
    assert fewer < all_blocks, f"all {all_blocks} blocks are computed, although everything may be reused"


def _run_with_cache(port: Port, model: Path, threshold: float | None) -> tuple[Tensor, int]:
    """Return the output of a tiny request, and the number of blocks that were computed."""
    config: dict[str, Any] = {}
    if threshold is not None:
        cache = {"Fn_compute_blocks": 1, "max_warmup_steps": 1, "residual_diff_threshold": threshold}
        config = {"cache_backend": "cache_dit", "cache_config": cache}
    tiny = tiny_request(port)
    request = Request(tiny.prompt, {**tiny.sampling, "num_inference_steps": _CACHE_STEPS})
    (result,) = run_workers(model, [request], config=config, setup=_count_forwards, probe=_computed_blocks)
    return result.outputs[0][port.output_type], result.probe


def _count_forwards() -> None:
    """Count the calls of this process's modules by class."""

    def count(module: nn.Module, _given: Any, _output: Any) -> None:
        _forwards[type(module).__name__] += 1

    register_module_forward_hook(count)


def _computed_blocks(pipeline: nn.Module) -> int:
    transformer: Any = pipeline.get_submodule("transformer")
    return sum(_forwards[name] for name in transformer._repeated_blocks)


def run_script(
    script: Path, model: Path, target: Path, *options: str, environment: Mapping[str, str] | None = None
) -> str:
    """Run the example script of a port with vLLM-Omni's engine on a tiny model; return what it printed.

    Args:
        script: ``generate_*.py``.
        model: a tiny model directory.
        target: the file to be written.
        options: further ones of the script.
        environment: further variables.
    """
    arguments = ["--model", str(model), "-o", str(target), "--tiny", "--dtype", "float32", "--enforce-eager", *options]
    done = subprocess.run(
        [sys.executable, str(script), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
        capture_output=True,
        text=True,
        timeout=_SECONDS,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert target.stat().st_size > 500, f"{target} has {target.stat().st_size} bytes"
    return done.stdout
