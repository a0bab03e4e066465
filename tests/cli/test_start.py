"""Imports at the start of commands: those that need no engine import no package that takes seconds."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from port_kit.cli import COMMANDS

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "command_start.py"
#: A start has some 250 modules of the standard library, click and the kit; ``inspect`` and ``doctor`` also of the Hub.
MODULES = 500
#: Commands that run models or web servers, or that import the code of diffusers.
HEAVY = {"generate", "page", "plan", "run", "serve", "verify"}
#: Commands whose work needs a checkpoint, a model directory or installed code.
OTHERS = {"convert", "download", "remove", "uninstall"}


def test_commands_without_an_engine_import_no_large_package() -> None:
    spec = importlib.util.spec_from_file_location("command_start", BENCHMARK)
    assert spec is not None and spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    assert {command.split()[0] for command in benchmark.LIGHT} == COMMANDS.keys() - HEAVY - OTHERS
    for command, found in benchmark.measure_all(benchmark.LIGHT).items():
        # a target is no complete source of itself: the comparison of the two runs and finds gaps
        assert found["exit"] in ((0, 1) if "--source target.json" in command else (0,)), command
        assert not set(benchmark.HEAVY) & set(found["modules"]), command
        assert len(found["modules"]) < MODULES, command
