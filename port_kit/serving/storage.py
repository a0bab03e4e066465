"""Storage of finished videos: files of this server only are deleted, and a full disk loses none.

vLLM-Omni's storage deletes every old file of its folder, and a job fails if its video cannot be written.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import re
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

from vllm_omni.entrypoints.openai.storage import FileStorageHandle, LocalStorageTTLManager, SaveContext

logger = logging.getLogger(__name__)

#: Names of the files that the server writes: the ids of jobs.
_OWN = re.compile(r"video_gen_[0-9a-f]{32}")
#: Videos that are kept in memory while the disk is full, the oldest is dropped first.
MAX_IN_MEMORY = 16
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class OwnStorage(LocalStorageTTLManager):
    """Storage in a folder, with a few videos in memory while the disk is full.

    Args:
        path: folder of the finished videos; it may hold other files.
        keep_seconds: time that a video is kept.
        sweep_seconds: time between two searches for expired videos.
    """

    def __init__(self, path: str, keep_seconds: int, sweep_seconds: int) -> None:
        super().__init__(ttl_seconds=keep_seconds, sweep_interval_seconds=sweep_seconds, storage_path=path)
        self._keep_seconds = keep_seconds
        self._in_memory: OrderedDict[str, tuple[int, float]] = OrderedDict()

    async def save(self, data: bytes, file_name: str) -> SaveContext:
        """Write a video; keep it in memory if the disk is full."""
        try:
            return await super().save(data, file_name)
        except OSError as error:
            if error.errno not in _FULL:
                raise
            logger.error("%s: %s; the video is kept in memory", self.storage_path, error.strerror)
        created = int(time.time())
        await asyncio.to_thread(self._remember, data, file_name, created + self._keep_seconds)
        return SaveContext(key=file_name, created_at=created, expires_at=created + self._keep_seconds)

    async def open(self, storage_key: str) -> FileStorageHandle | None:
        """Return a video's path, None if it does not exist."""
        if storage_key in self._in_memory:
            return FileStorageHandle(path=f"/proc/{os.getpid()}/fd/{self._in_memory[storage_key][0]}")
        return await super().open(storage_key)

    async def delete(self, file_name: str) -> bool:
        """Delete a video; return whether it existed."""
        return self._forget(file_name) or await super().delete(file_name)

    def _remember(self, data: bytes, name: str, expires: float) -> None:
        file = os.memfd_create(name)
        with os.fdopen(os.dup(file), "wb") as copy:
            copy.write(data)
        self._in_memory[name] = (file, expires)
        while len(self._in_memory) > MAX_IN_MEMORY:
            oldest = next(iter(self._in_memory))
            logger.error("%s is dropped: the disk is full, and %d videos are in memory", oldest, MAX_IN_MEMORY)
            self._forget(oldest)

    def _forget(self, name: str) -> bool:
        file, _ = self._in_memory.pop(name, (None, 0.0))
        if file is not None:
            os.close(file)
        return file is not None

    async def _sweep_once(self, cutoff: float) -> int:
        """Delete expired videos of this server; every other file stays."""
        for name in [name for name, (_, expires) in self._in_memory.items() if expires < time.time()]:
            self._forget(name)
        return await asyncio.to_thread(_delete_expired, Path(self.storage_path), cutoff)


def _delete_expired(folder: Path, cutoff: float) -> int:
    deleted = 0
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):
            if _OWN.fullmatch(path.name) and path.is_file() and not path.is_symlink() and path.stat().st_mtime < cutoff:
                path.unlink()
                deleted += 1
    return deleted


def use_own_storage(modules: list[Any], keep_seconds: int) -> OwnStorage:
    """Replace vLLM-Omni's storage in the modules that use it.

    The folder, and the time between two searches for expired videos, are those of vLLM-Omni's settings.
    """
    from vllm_omni.config.server_settings import SERVER_SETTINGS_CONFIG

    settings = SERVER_SETTINGS_CONFIG.storage
    storage = OwnStorage(settings.path, settings.file_ttl or keep_seconds, settings.ttl_sweep_interval or 300)
    for module in modules:
        module.STORAGE_MANAGER = storage
    return storage
