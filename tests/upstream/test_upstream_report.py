"""The report of upstream changes: the recorded surface is up to date, and each kind of change is found."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import pytest

from port_kit.runtime import upstream_report
from port_kit.upstream import surface
from port_kit.upstream.series import SERIES, installed_series
from port_kit.upstream.surface import Described, Surface
from port_kit.upstream.used_names import UsedNames, used_names
from tests.helpers import raises

USED = UsedNames(
    {"vllm.a.f": frozenset({"port_kit/x.py"}), "vllm.a.C": frozenset({"port_kit/y.py"})},
    {"port_kit/y.py": frozenset({"method"})},
)
RECORD = Surface(
    "0.30.0",
    {
        "vllm.a.C": Described("class", "(size, bias=True)", "1"),
        "vllm.a.C.method": Described("function", "(self)", "2"),
        "vllm.a.f": Described("function", "(x)", "3"),
    },
    {},
)


@cache
def _report(*options: str) -> subprocess.CompletedProcess[str]:
    """Run the report in a process without plugins."""
    command = [sys.executable, "-m", "port_kit.runtime.upstream_report", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_the_recorded_surface_is_that_of_the_installed_series() -> None:
    done = _report("--json")
    report = json.loads(done.stdout)
    assert report["release"] == version("vllm-omni")
    remedy = "python -m port_kit.runtime.upstream_report --record"
    assert (report["unrecorded"], report["gone"]) == ([], {}), remedy
    assert report["ok"] == (done.returncode == 0)
    assert report["failing"] == {} and report["guards"] > 50
    recorded = surface.read_record(installed_series()).names
    assert report["names"] == len(recorded), remedy


@pytest.mark.parametrize("series", SERIES)
def test_every_supported_series_has_a_record_of_names_that_are_used(series: str) -> None:
    used = used_names(series)
    assert surface.read_record(series).release.startswith(f"{series}.")
    assert [name for name in surface.read_record(series).names if not used.users(name)] == []


def test_a_record_is_read_as_it_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(surface, "FOLDER", tmp_path)
    path = surface.write_record(RECORD, "0.30")
    assert surface.read_record("0.30") == RECORD
    assert len(path.read_text().splitlines()) == len(RECORD.names) + 5
    surface.write_record(RECORD, "0.9")
    assert surface.recorded_series() == ["0.9", "0.30"]
    with raises("upstream_record", "0.9, 0.30", "got 0.31"):
        surface.read_record("0.31")


def test_without_changes_the_report_is_empty() -> None:
    report = upstream_report.compare(USED, RECORD, RECORD, {})
    assert report.ok and not report.bodies and not report.unrecorded


def test_a_missing_name_is_reported_with_its_users() -> None:
    names = {name: each for name, each in RECORD.names.items() if name == "vllm.a.C"}
    report = upstream_report.compare(USED, Surface("0.33.0", names, {"vllm.a.f": "ImportError: x"}), RECORD, {})
    assert not report.ok
    assert report.gone["vllm.a.f"] == upstream_report.Gone("ImportError: x", ["port_kit/x.py"])
    assert report.gone["vllm.a.C.method"].users == ["port_kit/y.py"]
    assert "in port_kit/x.py" in report.describe()


def test_recorded_names_that_are_no_longer_used_do_not_count() -> None:
    record = replace(RECORD, names={**RECORD.names, "vllm.old": Described("object", "", "")})
    assert upstream_report.compare(USED, RECORD, record, {}).ok


def test_signatures_and_bodies_are_told_apart() -> None:
    names = {
        **RECORD.names,
        "vllm.a.C": Described("class", "(size, bias=False)", "9"),
        "vllm.a.f": Described("function", "(x)", "9"),
        "vllm.new": Described("function", "()", "9"),
    }
    report = upstream_report.compare(USED, Surface("0.33.0", names, {}), RECORD, {})
    assert report.signatures == {"vllm.a.C": ("class (size, bias=True)", "class (size, bias=False)")}
    assert (report.bodies, report.unrecorded) == (["vllm.a.f"], ["vllm.new"])
    assert not report.ok
    text = report.describe()
    assert "    - bias=True\n    + bias=False\n" in text


def test_a_failing_guard_fails_the_report() -> None:
    report = upstream_report.compare(USED, RECORD, RECORD, {"sdpa_forward": ["parameters of x: expected 'a', got 'b'"]})
    assert not report.ok
    assert f"{report.guards - 1} of {report.guards} hold" in report.describe()
    assert "sdpa_forward: parameters of x" in report.describe()


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """A package in place of an upstream one, with one object of each kind."""
    made = ModuleType("vllm_omni_stand_in")
    source = (
        "class Class:\n"
        "    field: int\n"
        "    def __init__(self, size: int = 1) -> None: ...\n"
        "    def method(self, x: int, *, y: str = 'a') -> None: ...\n"
        "    def unused(self) -> None: ...\n"
        "    @property\n"
        "    def size(self) -> int: ...\n"
        "thing = Class()\n"
    )
    exec(source, made.__dict__)
    monkeypatch.setitem(sys.modules, made.__name__, made)
    monkeypatch.setattr(surface, "PACKAGES", (made.__name__,))
    yield made


def test_names_are_described_by_kind(package: ModuleType) -> None:
    root = package.__name__
    users = {name: frozenset({"x.py"}) for name in (f"{root}.Class", f"{root}.thing", f"{root}.thing.method", root)}
    users |= {f"{root}.Class.field": frozenset({"x.py"}), f"{root}.gone": frozenset({"x.py"})}
    used = UsedNames(users, {"x.py": frozenset({"method", "size"})})
    found = surface.read_installed(used, "0.33.0")
    assert {name.removeprefix(root): each[:2] for name, each in found.names.items()} == {
        "": ("module", ""),
        ".Class": ("class", "(size=1)"),
        ".Class.method": ("function", "(self, x, *, y='a')"),
        ".Class.size": ("property", ""),
        ".thing": ("object", ""),
    }
    assert list(found.missing) == [f"{root}.gone"]
