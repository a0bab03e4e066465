"""Processor seconds and imported modules of the commands of ``port-kit``, each in a fresh process.

The smallest of the rounds counts; seconds are user and system time of the command and its children. Commands of
``LIGHT`` need no engine. Those of ``ENGINE`` start with the same imports: vLLM-Omni's own.

    python benchmarks/command_start.py --rounds 5 --engine
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

#: Packages that take seconds to import.
HEAVY = ("torch", "vllm", "vllm_omni", "transformers", "diffusers", "numpy")
#: Commands that need no engine; some read the files of earlier ones.
LIGHT = (
    "list",
    "show ovi",
    "layout tp2xulysses2xcfg2",
    "manifest --port ovi --component transformer -o target.json",
    "manifest target.json",
    "coverage --port ovi --component transformer --source target.json",
    "rules check --port ovi --component transformer --source target.json",
    "rules explain blocks.0.weight --port ovi --component transformer --source target.json",
    "rules plan --port ovi --component transformer --source target.json",
    "rules suggest --source small.json --target small.json -o rules.toml",
    "rules invert --rules rules.toml --source small.json --target small.json -o inverse.toml",
    "new own --path custom",
    "new bypassing --path bypass",
    "new mixed --path hybrid",
    "inspect components",
    "hub components --repository org/model",
    "doctor --no-engine",
)
#: Commands that load vLLM-Omni.
ENGINE = ("doctor",)

_SCRIPT = """
import json, os, resource, signal, sys, threading, time
from port_kit.cli import main
report, sys.argv[1:] = sys.argv[1], sys.argv[2:]
def end_server():
    while signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGTERM)
if sys.argv[1] == "hub":
    threading.Thread(target=end_server, daemon=True).start()
try:
    main(prog_name="port-kit")
except SystemExit as end:
    code = end.code or 0
used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
result = {"exit": code, "seconds": sum(each.ru_utime + each.ru_stime for each in used), "modules": sorted(sys.modules)}
open(report, "w").write(json.dumps(result))
"""


def measure(command: str, folder: Path) -> dict[str, Any]:
    """Run a command of ``port-kit`` in a folder.

    Returns:
        ``exit`` (code), ``seconds`` of the processor, ``modules`` (names of all imported ones).
    """
    report = folder / "report"
    arguments = [sys.executable, "-P", "-c", _SCRIPT, str(report), *shlex.split(command)]
    done = subprocess.run(arguments, cwd=folder, capture_output=True, text=True, timeout=600)
    if not report.exists():
        raise RuntimeError(f"{command}: {done.stdout}{done.stderr}")
    result: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
    report.unlink()
    return result


def measure_all(commands: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """Run commands one after the other in one new folder, which has a small manifest."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tensors = {f"blocks.{number}.weight": [[4, 4], "float32"] for number in range(4)}
        (folder / "components").mkdir()
        (folder / "components" / "model_index.json").write_text('{"_class_name": "FluxPipeline"}', encoding="utf-8")
        (folder / "small.json").write_text(json.dumps(tensors), encoding="utf-8")
        return {command: measure(command, folder) for command in commands}


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--engine", action="store_true", help="also measure the commands that load vLLM-Omni")
    options = parser.parse_args()
    rounds = [measure_all(LIGHT + (ENGINE if options.engine else ())) for _ in range(options.rounds)]
    commands = {
        command: {
            "seconds": round(min(each[command]["seconds"] for each in rounds), 2),
            "modules": len(found["modules"]),
            "heavy": sorted(set(HEAVY) & set(found["modules"])),
        }
        for command, found in rounds[0].items()
    }
    print(json.dumps({"cpus": os.cpu_count(), "machine": platform.machine(), "commands": commands}, indent=1))


if __name__ == "__main__":
    main()
