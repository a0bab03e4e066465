"""What benchmarks of whole models share: model directories of real sizes with random weights, cold caches, memory.

Names, shapes and dtypes are those of the published checkpoints (``port_kit/testing/outlines``); values are seeded, of
the kind that a name promises, and made on a GPU where there is one. Not a benchmark itself.
"""

from __future__ import annotations

import ctypes
import json
import math
import mmap
import os
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from port_kit.dtypes import DTYPES

OUTLINES = {
    "transformer": "wan_transformer",
    "text_encoder": "umt5_xxl_encoder",
    "vae": "wan2_2_vae",
    "audio_vae": "mmaudio_vae_16k",
    "vocoder": "bigvgan_16k",
}
PIECE = 64 << 20

_libc = ctypes.CDLL(None, use_errno=True)
_BYTES = ctypes.POINTER(ctypes.c_ubyte)


def make_component(
    folder: Path, name: str, *, tiny: bool, device: str, dtype: str = "", layers: int = 0, files: int = 1
) -> int:
    """Write a component of DreamID-Omni: ``config.json`` and safetensors with the original names.

    Args:
        folder: the component's.
        name: of the component.
        tiny: its tiny size.
        device: where values are made.
        dtype: of all tensors; as published where it is empty.
        layers: blocks of a shorter transformer; 0 for all.
        files: how many files the tensors are spread over.

    Returns:
        Bytes of tensors.
    """
    from port_kit.models.dreamid_omni.recipe import RECIPE
    from port_kit.testing.tiny import expand, scale
    from port_kit.testing.tiny_fusion import components, outline

    config: dict[str, Any] = dict(RECIPE.configs[name])
    tensors = expand(outline(OUTLINES[name]))
    if tiny:
        small = components(RECIPE)[name]
        tensors = scale(tensors, sizes=small.sizes, layers=small.layers)
        config |= small.config
    if layers:
        tensors = scale(tensors, sizes={}, layers={"blocks": layers})
        config |= {tower: {**config[tower], "num_layers": layers} for tower in ("video", "audio")}
    if dtype:
        tensors = {key: (shape, dtype) for key, (shape, _) in tensors.items()}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return write_tensors(folder, tensors, files=files, device=device)


def write_tensors(
    folder: Path, tensors: dict[str, tuple[tuple[int, ...], str]], *, files: int = 1, device: str = "cpu"
) -> int:
    """Write safetensors files one tensor after the other, so that no more than one is in memory."""
    from port_kit.testing.tiny import fill

    sizes = {name: math.prod(shape) * DTYPES[dtype].itemsize for name, (shape, dtype) in tensors.items()}
    total, at, parts = sum(sizes.values()), 0, [list[str]() for _ in range(files)]
    for name, size in sizes.items():
        parts[min(at * files // total, files - 1)].append(name)
        at += size
    for number, names in enumerate(parts):
        label = "model" if files == 1 else f"model-{number + 1:05}-of-{files:05}"
        header, offset = dict[str, Any](), 0
        for name in names:
            shape, dtype = tensors[name]
            header[name] = {
                "dtype": DTYPES[dtype].word,
                "shape": list(shape),
                "data_offsets": [offset, offset + sizes[name]],
            }
            offset += sizes[name]
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / f"{label}.safetensors").open("wb", buffering=0) as stream:
            _write(stream, len(text).to_bytes(8, "little") + text)
            for name in names:
                _write(stream, _bytes(fill({name: tensors[name]}, device=device)[name]))
            os.fsync(stream.fileno())
    return total


def _bytes(tensor: Any) -> memoryview:
    import torch

    return memoryview(tensor.reshape(-1).view(torch.uint8).cpu().numpy())


def _write(stream: Any, data: bytes | memoryview) -> None:
    view, at = memoryview(data), 0
    while at < len(view):
        at += stream.write(view[at : at + PIECE])


def drop_caches(files: Iterable[Path]) -> dict[str, Any]:
    """Make the system forget what it holds of these files; says how, and which share of them is still held."""
    files = list(files)
    os.sync()
    how = "drop_caches"
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        how = "posix_fadvise"
        for file in files:
            with file.open("rb") as stream:
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return {"by": how, "still_cached": cached_share(files)}


def cached_share(files: Iterable[Path]) -> float:
    """Return which share of the files' pages the system holds; looking at them reads none."""
    import numpy

    held = pages = 0
    for file in files:
        mapped = numpy.memmap(file, numpy.uint8, "r")
        found = numpy.zeros(-(-len(mapped) // mmap.PAGESIZE), numpy.uint8)
        if _libc.mincore(
            ctypes.c_void_p(mapped.ctypes.data), ctypes.c_size_t(len(mapped)), found.ctypes.data_as(_BYTES)
        ):
            raise OSError(ctypes.get_errno(), f"mincore fails for {file}")
        held, pages = held + int((found & 1).sum()), pages + len(found)
    return round(held / max(pages, 1), 3)


class HostMemory:
    """Peaks of this process's memory while the context lasts, in bytes: resident, and of that what no file backs."""

    def __enter__(self) -> HostMemory:
        self.start = _status()
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
            self.exact = True
        except OSError:
            self.exact = False
        self.anonymous = self.resident = 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._end.wait(0.01):
            self._look()

    def _look(self) -> None:
        now = _status()
        self.resident = max(self.resident, now["VmRSS"], now["VmHWM"] if self.exact else 0)
        self.anonymous = max(self.anonymous, now["RssAnon"])

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()
        self._look()

    def report(self) -> dict[str, int]:
        """Return the peaks, and how far they are above what the process held before."""
        return {
            "peak_rss": self.resident,
            "peak_rss_above_start": self.resident - self.start["VmRSS"],
            "peak_anonymous": self.anonymous,
            "peak_anonymous_above_start": self.anonymous - self.start["RssAnon"],
        }


def _status() -> dict[str, int]:
    lines = Path("/proc/self/status").read_text().splitlines()
    pairs = (line.split(":", 1) for line in lines if line.startswith(("VmRSS", "VmHWM", "RssAnon")))
    return {key: int(value.split()[0]) << 10 for key, value in pairs}
