"""Several LoRAs as one: vLLM-Omni's requests and its LoRA manager take one adapter at a time.

A set is a small file in a folder of the kit that lists adapters with their scales. Its path takes the place of an
adapter's. The reader joins the matrices along the rank, so that their product is the scaled sum
(:func:`port_kit.runtime.lora.read_adapters`). Matrices are not written: clients of a server choose the scales, and a
copy for each choice would fill its disk.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from port_kit.errors import ConfigError, DownloadError, InputError
from port_kit.escape import reason_of
from port_kit.files import CACHE_VARIABLE, cache_folder, write_atomically

#: Most LoRAs of a set; the sum of their ranks is bounded as well (:data:`port_kit.runtime.lora.MAX_RANK`).
MAX_LORAS = 8
#: Largest scale, in either direction. Published adapters are used with 0.5 to 1.5.
MAX_SCALE = 100.0
#: Sets that are kept; more than a server's queue and the lines of a file of prompts that run at the same time.
_KEPT = 1024
_SCHEMA = "port-kit-loras/1"

Members = list[tuple[Path, float]]


def set_folder() -> Path:
    """Return the folder of sets; only files of this folder are read as sets."""
    return cache_folder() / "loras"


def write_set(members: Sequence[tuple[str | Path, float]]) -> Path:
    """Return the path of a set, which stands for an adapter in a request.

    Equal sets are one file. The oldest sets are deleted if there are more than 1024.

    Args:
        members: path and scale of each adapter.

    Raises:
        InputError: ``input_count``, ``input_value``; too many adapters, or a scale is out of range.
        ConfigError: ``config_invalid``; the folder cannot be written.
    """
    if not 1 <= len(members) <= MAX_LORAS:
        raise InputError(f"{len(members)} LoRAs; 1 to {MAX_LORAS} are supported", code="input_count")
    for path, scale in members:
        if not math.isfinite(scale) or abs(scale) > MAX_SCALE:
            raise InputError(
                f"the scale of {Path(path).name} is {scale}; expected {-MAX_SCALE:g} to {MAX_SCALE:g}",
                code="input_value",
            )
    loras = [{"path": str(Path(path).expanduser().absolute()), "scale": float(scale)} for path, scale in members]
    content = json.dumps({"schema": _SCHEMA, "loras": loras}, indent=2) + "\n"
    path = set_folder() / f"{hashlib.sha256(content.encode(errors='surrogateescape')).hexdigest()[:32]}.json"
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if path.exists():
            os.utime(path)
        else:
            write_atomically(path, content)
            _delete_oldest(path.parent)
    except (OSError, DownloadError) as error:
        raise ConfigError(
            f"a set of LoRAs cannot be written to {path.parent}: {reason_of(error)}",
            code="config_invalid",
            hint=f"set {CACHE_VARIABLE} to a folder that can be written",
        ) from error
    return path


def read_set(path: Path) -> Members | None:
    """Return the members of a set; None for a path outside the folder of sets, which is an adapter's.

    Raises:
        InputError: ``lora_file``; the set was deleted or damaged.
    """
    if path.parent != set_folder():
        return None
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
        return [(Path(lora["path"]), float(lora["scale"])) for lora in content["loras"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"the set of LoRAs {path.name} cannot be read: {reason_of(error)}",
            code="lora_file",
            hint="send the request again",
        ) from error


def _delete_oldest(folder: Path) -> None:
    ages = []
    for path in folder.glob("*.json"):
        try:
            ages.append((path.stat().st_mtime_ns, path))
        except FileNotFoundError:  # deleted by another process
            continue
    for _, path in sorted(ages)[:-_KEPT]:
        path.unlink(missing_ok=True)
