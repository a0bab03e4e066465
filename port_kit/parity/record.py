"""Runner of the original implementation that records a goldens folder.

The folder is written under a temporary name and renamed when it is complete. ``reference.json`` records its commit,
script, model and settings. A folder with the same record is reused.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from port_kit.download.gitcode import check_code, code_folder, describe_clone, plain_url
from port_kit.download.lock import LOCK_NAME, read_lock
from port_kit.download.recipe import Recipe
from port_kit.errors import ParityError
from port_kit.parity.original import OriginalImplementation
from port_kit.port import Port, lookup, resolve

PROVENANCE = "reference.json"
LOG = "reference.log"
PRECISIONS = ("fp32", "bf16")
#: Lines of the log that an error shows.
TAIL = 15


@dataclass(frozen=True)
class Settings:
    """Settings of a run of the original implementation.

    Attributes:
        python: interpreter of the environment with the original's requirements; None for this one.
        precisions: ``fp32``, the original's mathematics without rounding, and ``bf16``, as it runs, on CUDA only.
        device: ``cpu``, ``cuda`` or ``auto``.
        timeout: seconds for each precision.
        seed: of the inputs.
        code: folder with the original code, instead of the git code that a download fetched; it may have changes.
    """

    python: Path | None = None
    precisions: tuple[str, ...] = ("fp32",)
    device: str = "auto"
    timeout: float = 4 * 3600.0
    seed: int = 0
    code: Path | None = None


@dataclass(frozen=True)
class Recording:
    """A goldens folder that the original code made.

    Attributes:
        goldens: the folder.
        provenance: content of ``reference.json``: code, commit, script, model, settings.
        reused: whether it had been there already.
        seconds: that the original ran, in all.
    """

    goldens: Path
    provenance: Mapping[str, Any]
    reused: bool
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Return the recording as JSON-serializable values."""
        return {**self.provenance, "reused": self.reused, "seconds": round(self.seconds, 1)}


def record(
    port: Port, model: Path, output: Path, settings: Settings | None = None, note: Callable[[str], None] = print
) -> Recording:
    """Make a goldens folder by running the port's original code on a model directory.

    Args:
        port: must have an ``ORIGINAL`` beside its recipe.
        model: a complete model directory, whose lock records the commit of the original code.
        output: the goldens folder.
        settings: options of the run; None for the defaults.
        note: receives progress messages, one line per call.

    Raises:
        ParityError: ``reference_missing``, ``reference_python``, ``reference_failed``, ``reference_timeout``,
            ``reference_output``.
        DownloadError: ``code_broken`` if the checkout is not its commit any more.
    """
    settings, output = settings or Settings(), output.absolute()
    original, code = _find_code(port, model, settings.code)
    provenance = _provenance(original, code, model, settings)
    known = _known(output)
    if known is not None and known.get("made_from") == provenance["made_from"]:
        note(f"{output} was made by this code from this model already")
        return Recording(output, known, reused=True, seconds=0.0)
    if output.exists() and known is None and (not output.is_dir() or any(output.iterdir())):
        raise ParityError(
            f"{output} exists and was not made by a reference run",
            code="reference_output",
            hint="give another --output-dir",
        )
    aside = output.with_name(f"{output.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    started = time.monotonic()
    for precision in settings.precisions:
        note(f"running {code.name}, {code.version}, in {precision}; what it prints goes to {aside / LOG}")
        _run(port, original, _request(code, original, model, aside, precision, settings), aside, settings)
    _check(aside, settings.precisions)
    (aside / PROVENANCE).write_text(json.dumps(provenance, indent=1), encoding="utf-8")
    if output.exists():
        shutil.rmtree(output)
    aside.rename(output)
    return Recording(output, provenance, reused=False, seconds=time.monotonic() - started)


@dataclass(frozen=True)
class _Code:
    """The original code on this machine.

    Attributes:
        name: in messages.
        url: its origin.
        content: the commit of git code; otherwise a digest of the folder's modules.
        version: the commit in words; of a folder that is no clone, the digest.
        path: folder that makes it importable.
        folder: its checkout.
    """

    name: str
    url: str
    content: str
    version: str
    path: Path
    folder: Path


def _find_code(port: Port, model: Path, given: Path | None) -> tuple[OriginalImplementation, _Code]:
    """Return the declaration of the original, and its code: of a folder, or the git code of the model's lock."""
    if lookup(port.original) is None:
        raise ParityError(
            f"port {port.name} declares no original implementation",
            code="reference_missing",
            hint="compare with recorded goldens: --goldens DIR",
        )
    install = f"port-kit download {port.name} --output-dir {model} --with-reference"
    if not (model / "model_index.json").is_file():
        raise ParityError(
            f"{model} is not a complete model directory: it has no model_index.json",
            code="reference_missing",
            hint=f"make it, together with the original code: {install}",
        )
    original = resolve(port.original)
    assert isinstance(original, OriginalImplementation)
    return original, _git_code(port, original, model, install) if given is None else _code_in(given.absolute())


def _code_in(folder: Path) -> _Code:
    """Return the code of a folder, such as a clone."""
    modules = sorted(folder.rglob("*.py"))
    if not modules:
        raise ParityError(
            f"{folder} has no Python module: the original code is not there",
            code="reference_missing",
            hint=f"clone its repository: git clone URL {folder}",
        )
    content = b"".join(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes() for path in modules)
    digest = _sha256(content)
    version = describe_clone(folder) or f"digest {digest[:12]} of its modules"
    return _Code(folder.name, str(folder), digest, version, folder, folder)


def _git_code(port: Port, original: OriginalImplementation, model: Path, install: str) -> _Code:
    """Return the git code that a download fetched; it is the commit of the lock."""
    recipe = resolve(port.recipe)
    assert isinstance(recipe, Recipe)
    code = next((code for code in recipe.code if code.name == original.git_code), None)
    lock = read_lock(model)
    commit = lock.code.get(original.git_code, {}).get("commit") if lock is not None else None
    if code is None or commit is None or not code_folder(code.name, commit).is_dir():
        raise ParityError(
            f"the original code of {port.name} ({original.git_code or 'no git code is named'}) has not been fetched",
            code="reference_missing",
            hint=f"fetch it: {install}",
        )
    check_code(code, commit)
    folder = code_folder(code.name, commit)
    version, checkout = f"commit {commit[:12]}", folder / "repo" / code.path
    return _Code(code.name, plain_url(code.url), commit, version, folder / "path", checkout)


def _provenance(original: OriginalImplementation, code: _Code, model: Path, settings: Settings) -> dict[str, Any]:
    """Return the inputs of a goldens folder; ``made_from`` decides whether one may be used again."""
    lock = (model / LOCK_NAME).read_bytes()
    return {
        "made_from": {
            "code": code.url,
            "content": code.content,
            "script": _sha256(original.script_file().read_bytes()),
            "model": _sha256(lock),
            "options": dict(original.options),
            "precisions": list(settings.precisions),
            "device": settings.device,
            "seed": settings.seed,
        },
        "code_version": code.version,
        "model": str(model.absolute()),
        "python": str(settings.python or sys.executable),
    }


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _known(output: Path) -> dict[str, Any] | None:
    path = output / PROVENANCE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _request(
    code: _Code, original: OriginalImplementation, model: Path, output: Path, precision: str, settings: Settings
) -> dict[str, Any]:
    return {
        **original.options,
        "path": [str(code.path)],
        "folder": str(code.folder),
        "model": str(model.absolute()),
        "output": str(output),
        "precision": precision,
        "device": settings.device,
        "seed": settings.seed,
    }


def _run(
    port: Port, original: OriginalImplementation, request: Mapping[str, Any], folder: Path, settings: Settings
) -> None:
    """Run the script once; its output goes to the log, and its complete process group ends with it."""
    request_file = folder / f"request_{request['precision']}.json"
    request_file.write_text(json.dumps(request, indent=1), encoding="utf-8")
    python = str(settings.python or sys.executable)
    # -I keeps this environment's PYTHONPATH and the user's site out; the Hub is not asked for anything.
    command = [python, "-I", str(original.script_file()), str(request_file)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    with (folder / LOG).open("ab") as log:
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
            )
        except OSError as error:
            raise ParityError(
                f"{python} cannot be started: {error.strerror}",
                code="reference_python",
                hint="give the interpreter of the original's environment: --reference-python VENV/bin/python",
            ) from error
        try:
            status = process.wait(settings.timeout)
        except subprocess.TimeoutExpired as error:
            raise ParityError(
                f"the original code of {port.name} ran for more than {settings.timeout:g} s and was stopped\n"
                + _tail(folder / LOG),
                code="reference_timeout",
                hint="give it longer: --timeout SECONDS",
            ) from error
        finally:
            _end(process)
    if status != 0:
        raise _failure(port, python, status, folder / LOG)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill the process group, including workers that the original implementation started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass  # the group is gone
    process.wait()


def _failure(port: Port, python: str, status: int, log: Path) -> ParityError:
    """Return an error with the end of the log, and a command to install a missing package."""
    tail = _tail(log)
    last = tail.splitlines()[-1] if tail else ""
    hint = f"the whole output is in {log}"
    if last.startswith("ModuleNotFoundError: No module named "):
        missing = last.rpartition(" ")[2].strip("'").partition(".")[0]
        hint = f"install what the original needs: {python} -m pip install {missing}; or name another environment: "
        hint += "--reference-python VENV/bin/python"
    how = f"was ended by signal {-status}" if status < 0 else f"ended with exit code {status}"
    if status == -signal.SIGKILL:
        hint = f"the system ends processes that take too much memory; {hint}"
    return ParityError(
        f"the original code of {port.name} {how}\n{tail}", code="reference_failed", hint=hint, log=str(log)
    )


def _tail(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").rstrip().splitlines()
    return "\n".join(lines[-TAIL:])


def _check(folder: Path, precisions: tuple[str, ...]) -> None:
    """Require the files of a goldens folder: SET.json, and per case its inputs and one output per precision."""
    cases = sorted({path.parent for path in folder.rglob("outputs_*.safetensors")})
    missing = [] if (folder / "SET.json").is_file() else ["SET.json"]
    missing += [] if cases else ["outputs_*.safetensors"]
    missing += [
        str((case / "inputs.safetensors").relative_to(folder))
        for case in cases
        if not (case / "inputs.safetensors").is_file()
    ]
    missing += [
        f"a case with outputs_{word}.safetensors"
        for word in precisions
        if cases and not any((case / f"outputs_{word}.safetensors").is_file() for case in cases)
    ]
    if missing:
        raise ParityError(
            f"the original code ended well, but {folder} lacks {', '.join(missing)}",
            code="reference_output",
            hint=f"the script did not do its work; its output is in {folder / LOG}",
        )
