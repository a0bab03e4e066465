"""Finished videos on a disk: which files expire, and what a full disk keeps."""

from __future__ import annotations

import asyncio
import ctypes
import multiprocessing
import os
import subprocess
import time
from pathlib import Path

from port_kit.serving.storage import MAX_IN_MEMORY, OwnStorage

#: Flags of unshare(2).
CLONE_NEWNS, CLONE_NEWUSER = 0x00020000, 0x10000000
JOB = "video_gen_" + "0123456789abcdef" * 2


def test_only_expired_files_of_the_server_are_deleted(tmp_path: Path) -> None:
    names = ["holiday.mp4", JOB, JOB[:-1], f"{JOB}.mp4", "video_gen_new"]
    for name in names:
        (tmp_path / name).write_bytes(b"old")
        os.utime(tmp_path / name, (0, 0))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / JOB).write_bytes(b"old")
    (tmp_path / JOB.replace("0", "1")).symlink_to(tmp_path / "holiday.mp4")
    storage = OwnStorage(str(tmp_path), keep_seconds=60, sweep_seconds=1)

    async def run() -> None:
        fresh = JOB.replace("0", "2")
        context = await storage.save(b"fresh", fresh)
        assert context.expires_at == context.created_at + 60
        assert await storage._sweep_once(time.time() - 60) == 1
        found = await storage.open(fresh)
        assert found is not None and Path(found.path).read_bytes() == b"fresh"

    asyncio.run(run())
    assert not (tmp_path / JOB).exists()
    assert (tmp_path / "folder" / JOB).exists()
    assert all((tmp_path / name).exists() for name in names if name != JOB)


def test_a_full_disk_keeps_the_last_videos_in_memory(tmp_path: Path) -> None:
    """On a disk of 64 kB, in a process with mounts of its own; each video has 168 kB."""
    process = multiprocessing.get_context("fork").Process(target=_fill_disk, args=(tmp_path,))
    process.start()
    process.join(300)
    assert process.exitcode == 0


def _fill_disk(folder: Path) -> None:
    uid, gid, libc = os.getuid(), os.getgid(), ctypes.CDLL(None, use_errno=True)
    assert libc.unshare(CLONE_NEWUSER | CLONE_NEWNS) == 0, os.strerror(ctypes.get_errno())
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
    Path("/proc/self/gid_map").write_text(f"0 {gid} 1")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], check=True)
    asyncio.run(_save_more_than_fits(folder))


async def _save_more_than_fits(folder: Path) -> None:
    storage = OwnStorage(str(folder), keep_seconds=60, sweep_seconds=1)
    names = [f"video_gen_{number:032x}" for number in range(MAX_IN_MEMORY + 1)]
    for name in names:
        await storage.save(name.encode() * 4000, name)
    assert list(folder.iterdir()) == []
    assert await storage.open(names[0]) is None, "the oldest is dropped"
    for name in names[1:]:
        found = await storage.open(name)
        assert found is not None and Path(found.path).read_bytes() == name.encode() * 4000
    assert await storage.delete(names[1]) and not await storage.delete(names[1])
    assert await storage.open(names[1]) is None
    await storage._sweep_once(time.time() - 60)
    assert await storage.open(names[2]) is not None
    await storage.save(b"small", names[3])
    assert (folder / names[3]).read_bytes() == b"small"
