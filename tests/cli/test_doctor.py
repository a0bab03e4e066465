"""``port-kit doctor``: its checks in this environment, reports of problems, and secrets that it never prints."""

from __future__ import annotations

import json
import py_compile
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from port_kit.cli import main
from port_kit.runtime import diagnose as module
from port_kit.runtime.diagnose import Check, diagnose
from port_kit.upstream.series import SERIES, series_of


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    """The complete command with its child process."""
    done = subprocess.run(
        [sys.executable, "-m", "port_kit", "doctor", "--json"], capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


def test_it_finds_platform_plugins_and_output_types(report: dict[str, Any]) -> None:
    assert (report["schema"], report["ok"], report["command"]) == ("port-kit/1", True, "doctor")
    details = {check["name"]: check["detail"] for check in report["data"]["checks"]}
    assert details["platform"] == "port_kit.runtime.platform.CpuOmniPlatform"
    assert details["plugins"] == "all ports registered"
    assert details["output of dreamid_omni"] == "video (declared: video)"
    assert all(check["ok"] for check in report["data"]["checks"])


def test_it_reports_the_versions(report: dict[str, Any]) -> None:
    versions = report["data"]["versions"]
    assert series_of(versions["vllm-omni"]) in SERIES
    assert versions["torch"] is not None and versions["port-kit"] is not None


def test_a_token_is_seen_and_never_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_never_show_this")
    for flags in ([], ["--json"]):
        result = CliRunner().invoke(main, ["doctor", "--no-engine", *flags])
        assert "present, from HF_TOKEN" in result.output
        assert "never_show" not in result.output + result.stderr


def test_without_the_engine_no_child_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", None)
    _, checks = diagnose(engine=False)
    assert {"python", "runtime", "torchvision", "torchaudio", "bytecode", "ports", "token", "disk"} <= {
        check.name for check in checks
    }


def test_a_check_that_does_not_hold_fails_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    bad = Check("disk", False, "0.1 GiB free", "make room")
    monkeypatch.setattr("port_kit.cli.doctor.diagnose", lambda engine: ({"torch": None}, [bad]))
    result = CliRunner().invoke(main, ["doctor"])
    assert result.exit_code == 1
    assert "FAIL  0.1 GiB free" in result.output and "hint: make room" in result.output
    assert "not installed" in result.output


@pytest.mark.parametrize(
    ("torch_is_cpu", "release", "ok"), [(True, "+cu130", False), (True, "+cpu", True), (False, "+cu130", True)]
)
@pytest.mark.parametrize("name", ["torchvision", "torchaudio"])
def test_a_cuda_build_beside_a_cpu_build_of_torch_is_found(
    name: str, torch_is_cpu: bool, release: str, ok: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("")
    (tmp_path / name / "version.py").write_text(f"__version__ = '2.11.0{release}'\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(module, "_torch_is_cpu_build", lambda: torch_is_cpu)
    assert module._companion(name).ok == ok


@pytest.mark.parametrize(
    ("writes", "has", "words"), [(True, False, "first start"), (False, True, "present"), (False, False, "compileall")]
)
def test_packages_that_each_process_compiles_are_named(
    writes: bool, has: bool, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "bulky" / "__init__.py"
    source.parent.mkdir()
    source.write_text("")
    if has:
        py_compile.compile(str(source))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(module, "_LARGE", ("bulky", "not_installed_here"))
    monkeypatch.setattr(sys, "dont_write_bytecode", not writes)
    check = module._bytecode()
    assert check.ok and words in check.detail
    assert (str(source.parent) in check.detail) == (not writes and not has)


@pytest.mark.parametrize(
    ("change", "name", "words"),
    [
        ({"registered": {"dreamid_omni": False}}, "plugins", "dreamid_omni"),
        ({"platform": "vllm_omni.platforms.interface.UnspecifiedOmniPlatform"}, "platform", "Unspecified"),
        ({"output_types": {"dreamid_omni": None}}, "output of dreamid_omni", "None"),
        ({"error": {"code": "x", "message": "broken", "hint": "mend"}}, "plugins", "[x] broken"),
    ],
)
def test_a_childs_report_becomes_a_failed_check(change: dict[str, Any], name: str, words: str) -> None:
    good = {
        "platform": "a.B",
        "registered": {"dreamid_omni": True},
        "output_types": {"dreamid_omni": "video"},
        "upstream": {"sdpa_forward": []},
    }
    assert all(check.ok for check in module._reported(good))
    (failed,) = [check for check in module._reported({**good, **change}) if not check.ok]
    assert failed.name == name and words in failed.detail and failed.hint


def test_guards_are_counted_and_failed_ones_listed() -> None:
    found = module._guards({"holds": [], "fails": ["type of a:b: expected 'dict', got 'list'", "another"]})
    summary, *failed = found
    assert not summary.ok and summary.detail.startswith("1 of 2 guards")
    assert [check.name for check in failed] == ["upstream fails"] * 2
    assert "expected 'dict', got 'list'" in failed[0].detail
