"""Parts of safetensors files, read into memory that is there, by several threads."""

from __future__ import annotations

import gc
import json
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from port_kit.remap import Rule, RuleSet
from port_kit.remap.local import load_local
from port_kit.remap.reads import File, Part, Readers, pieces

SHAPE = (6, 4, 5)


@pytest.fixture
def opened(tmp_path: Path) -> tuple[File, numpy.ndarray]:
    """A file whose second tensor counts its elements."""
    values = torch.arange(120, dtype=torch.int16).reshape(SHAPE)
    save_file({"first": torch.zeros(3), "w": values}, tmp_path / "model.safetensors")
    return File(tmp_path / "model.safetensors"), values.numpy()


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("piece", [1, 100, 1 << 20])
@pytest.mark.parametrize(
    ("box", "perms"),
    [
        (((0, 6), (0, 4), (0, 5)), ()),
        (((2, 5), (0, 4), (0, 5)), ()),
        (((2, 3), (1, 3), (0, 5)), ()),
        (((0, 6), (1, 3), (0, 5)), ()),
        (((1, 6), (0, 4), (2, 3)), ()),
        (((2, 5), (0, 4), (0, 5)), ((2, 0, 1),)),
    ],
)
def test_parts_arrive(
    opened: tuple, monkeypatch: pytest.MonkeyPatch, threads: int, piece: int, box: tuple, perms: tuple
) -> None:
    monkeypatch.setattr("port_kit.remap.reads.PIECE", piece)
    file, values = opened
    expected = values[tuple(slice(*span) for span in box)]
    for perm in perms:
        expected = expected.transpose(perm)
    # the place is a part of a larger tensor: rows that stand together, then columns
    for axis in (0, expected.ndim - 1):
        room = numpy.full([extent + 2 * (at == axis) for at, extent in enumerate(expected.shape)], -1, numpy.int16)
        local = tuple((1, extent + 1) if at == axis else (0, extent) for at, extent in enumerate(expected.shape))
        part = Part.of(box, local, perms)
        with Readers(threads) as readers:
            for read in pieces(file, "w", part, expected.nbytes, lambda room=room: torch.from_numpy(room)):
                readers.put(read)
            readers.finish()
        index = tuple(slice(*span) for span in local)
        assert (room[index] == expected).all()
        room[index] = -1
        assert (room == -1).all()


@pytest.mark.parametrize("threads", [1, 2])
def test_an_error_of_any_thread_ends_all(opened: tuple, threads: int) -> None:
    file, values = opened
    room = numpy.zeros(SHAPE, numpy.int16)
    whole = tuple((0, extent) for extent in SHAPE)
    with pytest.raises(KeyError, match="gone"), Readers(threads) as readers:
        for name in ("gone", "w"):
            for read in pieces(file, name, Part.of(whole, whole, ()), values.nbytes, lambda: torch.from_numpy(room)):
                readers.put(read)
        readers.finish()


@pytest.mark.parametrize("threads", [1, 3])
def test_torch_has_its_threads_again(opened: tuple, threads: int) -> None:
    """Also a thread that is new to torch, and after an error."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        for name in ("w", "gone"):
            part = Part.of(((0, 6), (0, 4), (0, 5)), ((0, 6), (0, 4), (0, 5)), ())
            with suppress(KeyError), Readers(threads) as readers:
                for read in pieces(opened[0], name, part, 240, lambda: torch.zeros(SHAPE, dtype=torch.int16)):
                    readers.put(read)
                readers.finish()
            assert torch.get_num_threads() == 3
            with ThreadPoolExecutor(1) as pool:
                assert pool.submit(torch.get_num_threads).result() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("mode", [nullcontext, torch.inference_mode])
def test_odd_tensors_and_inference_mode(tmp_path: Path, mode: Callable[[], AbstractContextManager]) -> None:
    """A scalar, nothing, and numbers at odd addresses; parameters made in inference mode, which is one thread's own."""
    values = {
        "a": torch.tensor(3.0),
        "b": torch.zeros(3, 0),
        "c": torch.arange(5.0).double(),
        "odd": torch.zeros(3).bool(),
    }
    names, data, entries = ("odd", "a", "b", "c"), b"", []
    for name in names:
        raw = values[name].numpy().tobytes()
        dtype, span = {1: "BOOL", 4: "F32", 8: "F64"}[values[name].element_size()], [len(data), len(data) + len(raw)]
        entries.append(f'"{name}":{{"dtype":"{dtype}","shape":{list(values[name].shape)},"data_offsets":{span}}}')
        data += raw
    header = ("{" + ",".join(entries) + "}").encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data)
    with mode():
        module = nn.Module()
        for name, value in values.items():
            module.register_buffer(name, torch.full_like(value, 1))
        done = load_local(module, tmp_path, RuleSet("same", (Rule(r"(\w+)", r"\1"),)), threads=3)
        assert done.loaded == set(values) and done.bytes_read == len(data)
        assert all(buffer.equal(values[name]) for name, buffer in module.named_buffers())


def test_a_file_larger_than_memory_is_mapped(tmp_path: Path) -> None:
    """A sparse one of a terabyte, of which one row is read; bytes outlive the file's object."""
    shape = [1 << 20, 1 << 20]
    header = json.dumps({"w": {"dtype": "U8", "shape": shape, "data_offsets": [0, 1 << 40]}}).encode()
    with (tmp_path / "m.safetensors").open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        stream.truncate(8 + len(header) + (1 << 40))
        stream.seek(-3, 2)
        stream.write(b"abc")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        row = File(tmp_path / "m.safetensors").bits("w")[-1]
    gc.collect()
    assert bytes(row[-4:].tolist()) == b"\0abc"


def test_threads_end_with_the_context() -> None:
    with pytest.raises(KeyError), Readers(3):
        raise KeyError("while the reads are found")
