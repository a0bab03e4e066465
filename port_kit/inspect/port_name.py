"""The ``port-kit new`` command for an inspected model, and the name of its port."""

from __future__ import annotations

import shlex
from pathlib import Path

from port_kit.inspect.adapted_classes import FAMILIES
from port_kit.inspect.known_classes import omni
from port_kit.inspect.report import ModelPath


def new_command(target: str, path: ModelPath, pipeline: str, transformer: str) -> str:
    """Return the ``port-kit new`` that reads ``target``.

    Args:
        target: the repository id or the folder.
        path: that the model is on.
        pipeline: its pipeline's class, or empty.
        transformer: its transformer's class, or empty. Of diffusers, where no template adapts it, the transformer is
            ported and the rest stays diffusers'.
    """
    family = FAMILIES.get(transformer)
    is_adapted = family is not None and family.pipeline == pipeline
    kind = " --path hybrid" if path == "diffusers" and not is_adapted else ""
    return f"port-kit new {port_name(target)}{kind} --from {shlex.quote(target)}"


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
