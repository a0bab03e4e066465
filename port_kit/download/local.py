"""Files on this machine that may hold the bytes of a download already."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from port_kit.download.parts import FileSpec
from port_kit.download.plan import original_of


def find_local(directory: Path, spec: FileSpec, use_cache: bool) -> Path | None:
    """Return a kept original, or a file of the user's Hub cache; its content is hashed like anything that arrives."""
    candidates = [directory / original_of(spec).target] if spec.convert else []
    if use_cache and _may_be_cached(spec.repo_id):
        from huggingface_hub import try_to_load_from_cache

        with contextlib.suppress(OSError):  # a cache that may not be read is not used
            cached = try_to_load_from_cache(spec.repo_id, spec.path, revision=spec.commit)
            candidates += [Path(cached)] if isinstance(cached, str) else []
    return next((path for path in candidates if _is_readable(path, spec.size)), None)


def _may_be_cached(repo_id: str) -> bool:
    """Return True if the Hub cache has a repository; huggingface_hub's closer look costs half a second of imports."""
    from huggingface_hub import constants

    return os.path.isdir(os.path.join(constants.HF_HUB_CACHE, f"models--{repo_id.replace('/', '--')}"))


def _is_readable(path: Path, size: int) -> bool:
    """Return True if a file of this size can be read; whoever may not look at it goes without."""
    try:
        return path.is_file() and path.stat().st_size == size and os.access(path, os.R_OK)
    except OSError:
        return False
