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

from port_kit.errors import RemapError
from port_kit.manifest import Manifest
from port_kit.remap import Rule, RuleSet
from port_kit.remap.local import load_local
from port_kit.remap.readahead import read_ahead
from port_kit.remap.reads import Cut, File, Part, Read, Readers, Window, cuts

SHAPE = (6, 4, 5)


def open_file(path: Path) -> File:
    return File(path.parent, path.name, Manifest.from_safetensors(path))


@pytest.fixture
def opened(tmp_path: Path) -> tuple[File, numpy.ndarray]:
    """A file whose second tensor counts its elements."""
    values = torch.arange(120, dtype=torch.int16).reshape(SHAPE)
    save_file({"first": torch.zeros(3), "w": values}, tmp_path / "model.safetensors")
    return open_file(tmp_path / "model.safetensors"), values.numpy()


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
    for size in ("PIECE", "FIRST", "LEFT"):
        monkeypatch.setattr(f"port_kit.remap.reads.{size}", piece)
    file, values = opened
    expected = values[tuple(slice(*span) for span in box)]
    for perm in perms:
        expected = expected.transpose(perm)
    # the place is a part of a larger tensor: rows that stand together, then columns
    for axis in (0, expected.ndim - 1):
        room = numpy.full([extent + 2 * (at == axis) for at, extent in enumerate(expected.shape)], -1, numpy.int16)
        local = tuple((1, extent + 1) if at == axis else (0, extent) for at, extent in enumerate(expected.shape))
        into = torch.from_numpy(room)
        with Readers(threads) as readers:
            readers.put(Read(file, "w", into, cuts(Part(box, local, perms), SHAPE, into.stride(), 2)))
            readers.finish()
        index = tuple(slice(*span) for span in local)
        assert (room[index] == expected).all()
        room[index] = -1
        assert (room == -1).all()


@pytest.mark.parametrize("piece", [10, 1 << 20])
@pytest.mark.parametrize(("box", "local"), [(((2, 5), (0, 4), (0, 5)), (3, 20)), (((1, 5), (1, 2), (0, 5)), (4, 5))])
def test_parts_take_another_shape(
    opened: tuple, monkeypatch: pytest.MonkeyPatch, piece: int, box: tuple, local: tuple[int, int]
) -> None:
    """Also where their rows stand apart in the file, and in memory."""
    monkeypatch.setattr("port_kit.remap.reads.PIECE", piece)
    file, values = opened
    room = torch.full((local[1], local[0]), -1, dtype=torch.int16).T
    found = cuts(Part(box, tuple((0, extent) for extent in local)), SHAPE, room.stride(), 2)
    assert len(found) == (local[0] if piece == 10 else 1)
    with Readers(2) as readers:
        readers.put(Read(file, "w", room, found))
        readers.finish()
    assert (room.numpy() == values[tuple(slice(*span) for span in box)].reshape(local)).all()


def test_what_was_read_is_unmapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but what was asked for last, while the file is still open; and what is unmapped can be read again."""
    values = {f"{at:02}": torch.full((1 << 18,), at, dtype=torch.int32) for at in range(32)}
    path = tmp_path / "model.safetensors"
    save_file(values, path)
    module = nn.Module()
    for name, value in values.items():
        module.register_buffer(name, torch.zeros_like(value))

    def mapped() -> int:
        rows = Path("/proc/self/smaps").read_text().partition(str(path))[2].splitlines()
        return 1024 * int(next(row.split()[1] for row in rows if row.startswith("Rss:")))

    whole = Window((1 << 18,), (1,), 0)
    for left, least, most in ((1 << 40, 30 << 20, 33 << 20), (2 << 20, 0, 12 << 20)):
        monkeypatch.setattr("port_kit.remap.reads.LEFT", left)
        file = open_file(path)
        with Readers(1) as readers:
            for name, buffer in module.named_buffers():
                readers.put(Read(file, name, buffer, [Cut(whole, whole, 1 << 20)] * 4))
            readers.finish()
        assert least <= mapped() <= most
        assert all(buffer.equal(values[name]) for name, buffer in module.named_buffers())
        assert int(file.bits("00")[0][file.bits("31")[1]]) == 31
        del file


def test_an_index_of_files_below_it(tmp_path: Path) -> None:
    """They may have one name in two folders."""
    module = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)).requires_grad_(False)
    weight_map = {name: f"{name[0]}/model.safetensors" for name in module.state_dict()}
    for layer in "01":
        (tmp_path / layer).mkdir()
        save_file(
            {f"{layer}.{k}": v for k, v in module[int(layer)].state_dict().items()},
            tmp_path / layer / "model.safetensors",
        )
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    for path in (index, tmp_path):
        loaded = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)).requires_grad_(False)
        load_local(loaded, path, RuleSet("same", (Rule(r"(.+)", r"\1"),)))
        assert all(value.equal(module.state_dict()[name]) for name, value in loaded.state_dict().items())
        assert {name: value.tolist() for name, value in read_ahead(path)} == {
            name: value.tolist() for name, value in module.state_dict().items()
        }


def test_a_file_that_is_replaced_after_its_header_was_read(tmp_path: Path) -> None:
    """By one of the same size, whose tensors stand elsewhere."""
    path, other = tmp_path / "model.safetensors", tmp_path / "other"
    save_file({"a": torch.zeros(4), "b": torch.ones(4)}, path)
    source = Manifest.from_safetensors(path)
    save_file({"b": torch.ones(4), "a": torch.zeros(4)}, other)
    other.replace(path)
    with pytest.raises(RemapError, match="changed or replaced") as caught:
        File(path.parent, path.name, source)
    assert caught.value.code == "manifest_invalid"


@pytest.mark.parametrize("threads", [1, 2])
def test_an_error_of_any_thread_ends_all(opened: tuple, threads: int) -> None:
    file, room = opened[0], torch.zeros(SHAPE, dtype=torch.int16)
    whole = Window(SHAPE, (20, 5, 1), 0)
    wrong = Cut(whole, whole.rows(0, 5), 240)
    with pytest.raises(RuntimeError, match="size of tensor"), Readers(threads) as readers:
        readers.put(Read(file, "w", room, (wrong, Cut(whole, whole, 240))))
        readers.finish()


@pytest.mark.parametrize("threads", [1, 3])
def test_torch_has_its_threads_again(opened: tuple, threads: int) -> None:
    """Also a thread that is new to torch, and after an error."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        whole = Window(SHAPE, (20, 5, 1), 0)
        for name in ("w", "gone"):
            with suppress(KeyError), Readers(threads) as readers:
                readers.put(Read(opened[0], name, torch.zeros(SHAPE, dtype=torch.int16), [Cut(whole, whole, 240)]))
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
        bits, start = open_file(tmp_path / "m.safetensors").bits("w")
        row = bits[start:][-(1 << 20) :]
    del bits
    gc.collect()
    assert bytes(row[-4:].tolist()) == b"\0abc"


def test_threads_end_with_the_context() -> None:
    with pytest.raises(KeyError), Readers(3):
        raise KeyError("while the reads are found")
