"""The plan of a port's git code: inferred and proven in processes that import it from the port's folder."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from port_kit.errors import ScaffoldError
from port_kit.scaffold.request import NewPort

#: Layouts that are proven.
_LAYOUTS = ("tp2", "ulysses2", "ring2", "hsdp2", "tp2xulysses2")
#: Characters of the output of a failed command that an error contains.
_SHOWN = 2000


def write_plan(port: NewPort, report: Callable[[str], None]) -> Path:
    """Infer and prove the plan of the transformer in a port's folder; return its path below ``port.target``.

    Args:
        port: was written.
        report: receives a line per step.

    Raises:
        ScaffoldError: ``scaffold_unsupported``; a command failed.
    """
    root = port.target.resolve()
    path = root / port.name / "plan.toml"
    subject = f"{port.name}.model.transformer:make_subject"
    layouts = [f"--layout={layout}" for layout in _LAYOUTS]
    for arguments in (["infer", subject, "-o", str(path)], ["prove", str(path), "--write", *layouts]):
        command = [sys.executable, "-m", "port_kit", "plan", *arguments]
        report(f"port-kit plan {' '.join(arguments)}")
        paths = [str(root), str(root / "original"), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise ScaffoldError(
                f"the plan of {subject} is not proven:\n{(done.stdout + done.stderr)[-_SHOWN:]}",
                code="scaffold_unsupported",
                hint=f"PYTHONPATH={root}:{root}/original port-kit plan {' '.join(arguments)}",
            )
    return port.target / path.relative_to(root)
