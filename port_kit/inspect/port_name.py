"""The command to run after an inspection, and the name of the model's port."""

from __future__ import annotations

import shlex
from pathlib import Path

from port_kit.inspect.known_classes import omni
from port_kit.inspect.parallel_plans import plan_origin
from port_kit.inspect.report import ModelPath


def next_command(target: str, path: ModelPath, transformer: str) -> str:
    """Return the command that brings ``target`` to vLLM-Omni.

    Args:
        target: the repository id or the folder.
        path: that the model is on.
        transformer: class of its transformer or UNet, or empty. A pipeline of diffusers without a parallel plan is run
            without a port; without a transformer only its other components are of use.
    """
    quoted = shlex.quote(target)
    if path == "diffusers" and transformer and plan_origin(transformer) == "none":
        return f"port-kit run {quoted} --cfg-parallel-size 2"
    kind = " --path hybrid" if path == "diffusers" and not transformer else ""
    return f"port-kit new {port_name(target)}{kind} --from {quoted}"


def port_name(target: str) -> str:
    """Return a name for a port of a repository or folder: its last part, as a module's name.

    A name that contains a word by which vLLM-Omni finds its own models in a folder's name becomes ``my_port``.
    """
    last = Path(target).resolve().name if Path(target).is_dir() else target.rpartition("/")[2]
    words = "".join(letter if letter.isalnum() and letter.isascii() else "_" for letter in last.lower()).split("_")
    name = "_".join(filter(None, words))[:30].strip("_") or "model"
    name = name if name[0].isalpha() else f"m{name}"[:30]
    is_misleading = any(key.replace("_", "") in name.replace("_", "") for key in omni().stages)
    return "my_port" if is_misleading else name
