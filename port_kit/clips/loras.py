"""LoRAs of a request: files and scales on the command line, in a file of prompts and in a clip's settings."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from port_kit.clips.settings import Reference
from port_kit.errors import InputError
from port_kit.port import HostedPort, Port
from port_kit.runtime.lora_files import check_files
from port_kit.runtime.lora_sets import MAX_LORAS, MAX_SCALE

#: Names of the files, in their order, and of their scales.
LORA, LORA_SCALE = "lora", "lora_scale"


def takes_loras(port: Port) -> bool:
    """Return True if requests to a port may have LoRAs; hosted pipelines apply none."""
    return not isinstance(port, HostedPort)


def check_loras(request: Mapping[str, Any], references: Mapping[str, Sequence[object]]) -> None:
    """Check the number of LoRAs and their scales, before an engine starts.

    Args:
        request: options of a request; ``lora_scale`` is a list.
        references: its references by kind.

    Raises:
        InputError: ``input_count``, ``input_value``; the scales do not belong to the files, or are out of range.
    """
    files, scales = references.get(LORA, ()), request.get(LORA_SCALE)
    if len(files) > MAX_LORAS:
        raise InputError(f"{len(files)} LoRAs; at most {MAX_LORAS} are supported", code="input_count")
    if scales is None:
        return
    if len(scales) != len(files):
        raise InputError(
            f"{len(files)} LoRAs and {len(scales)} values of lora_scale; expected one for each",
            code="input_count",
            hint="give the scales in the order of the files, or none of them",
        )
    for scale in scales:
        if not math.isfinite(scale) or abs(scale) > MAX_SCALE:
            raise InputError(
                f"lora_scale is {scale}; expected {-MAX_SCALE:g} to {MAX_SCALE:g}",
                code="input_value",
                hint="most LoRAs are used with 0.5 to 1.5",
            )


def lora_reference(path: str | Path) -> Reference:
    """Return the reference of a LoRA, checked as far as its header tells; its hash is that of all of its files.

    Raises:
        InputError: ``source_missing``, ``lora_file``; there is no LoRA.
    """
    path = Path(path)
    hashes = [Reference.of(file).sha256 for file in check_files(path)[0].paths]
    joined = hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
    return Reference(path.name, joined)
