"""Manifests of remote checkpoints, from headers alone, before anything is downloaded."""

from __future__ import annotations

import re

from port_kit.errors import RemapError
from port_kit.manifest import Manifest

_REMOTE = re.compile(r"(?:hf://)?([\w.-]+/[\w.-]+?)(?:@([\w./-]+))?(?::(.+))?")


def looks_remote(text: str) -> bool:
    """Whether a text can be ``owner/name[@revision][:path]``."""
    return _REMOTE.fullmatch(text) is not None and not text.startswith((".", "/"))


def read_remote(text: str, *, wrapper: str = "") -> Manifest:
    """Read a repository's headers: one safetensors file, an index or a folder of them, or a pickle checkpoint."""
    raise RemapError(text, code="manifest_invalid")
