"""Reading ahead: the tensors of the files bit for bit, in bounded memory; what goes wrong has a name."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from port_kit.errors import RemapError
from port_kit.remap import Rule, RuleSet, load_weights
from port_kit.remap.readahead import read_ahead

DTYPES = (torch.bfloat16, torch.float32, torch.float16, torch.int64, torch.bool, torch.float8_e4m3fn, torch.uint8)

#: Prints by how much private memory was above its start, looked at whenever a tensor was taken.
PEAK = """
import sys
from pathlib import Path
from port_kit.remap.readahead import read_ahead

def private():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))

import torch
assert torch.zeros(9).sum() == 0
peak, start = 0, private()
for _name, tensor in read_ahead(sys.argv[1], block=1 << 19, blocks=4, threads=2):
    assert tensor.sum() == 0
    peak = max(peak, private() - start)
print(peak)
"""


def checkpoint(folder: Path, files: int = 2) -> dict[str, Tensor]:
    """Files of tensors of many sizes and dtypes, some of a few bytes, some of many blocks, one of none."""
    random = torch.Generator().manual_seed(0)
    shapes = [(3,), (), (17, 5), (0, 4), (1000, 33), (1,), (64, 64)]
    everything: dict[str, Tensor] = {}
    for number in range(files):
        tensors = {}
        for index, shape in enumerate(shapes * 2):
            values = torch.randint(0, 100, shape, generator=random)
            tensors[f"file{number}.t{index}"] = values.to(DTYPES[(index + number) % len(DTYPES)])
        save_file(tensors, folder / f"model-{number + 1:05}-of-{files:05}.safetensors")
        everything |= tensors
    return everything


@pytest.mark.parametrize(("block", "blocks", "threads"), [(1, 1, 1), (7, 2, 5), (4096, 3, 2), (1 << 20, 16, 8)])
def test_tensors_are_those_of_the_files(tmp_path: Path, block: int, blocks: int, threads: int) -> None:
    if block == 1:
        save_file({"a": torch.arange(5.0), "b": torch.tensor(3)}, tmp_path / "model.safetensors")
        expected = load_file(tmp_path / "model.safetensors")
    else:
        expected = checkpoint(tmp_path)
    before = threading.active_count()
    got = dict(read_ahead(tmp_path, prefix="part.", block=block, blocks=blocks, threads=threads))
    assert threading.active_count() == before
    assert got.keys() == {f"part.{name}" for name in expected}
    for name, tensor in expected.items():
        found = got[f"part.{name}"]
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape), name
        assert found.view(-1).view(torch.uint8).equal(tensor.reshape(-1).view(torch.uint8)), name


def test_it_may_be_read_in_inference_mode(tmp_path: Path) -> None:
    """That mode is one thread's own: the threads that read are not in it."""
    expected = checkpoint(tmp_path)
    with torch.inference_mode():
        assert dict(read_ahead(tmp_path, block=4096, blocks=2, threads=2)).keys() == expected.keys()


def test_an_index_names_the_files(tmp_path: Path) -> None:
    expected = checkpoint(tmp_path)
    entries = ", ".join(f'"{name}": "model-0000{int(name[4]) + 1}-of-00002.safetensors"' for name in expected)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {' + entries + "}}")
    assert dict(read_ahead(index)).keys() == expected.keys()


def test_a_load_is_that_of_the_mapped_file(tmp_path: Path) -> None:
    """Through rules, casts included."""
    source = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 20))
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    rules = RuleSet("renamed", (Rule(r"(\d)\.(\w+)", r"layer\1.\2"),), narrow=True)
    modules = []
    for stream in (load_file(tmp_path / "model.safetensors").items(), read_ahead(tmp_path, block=100, blocks=2)):
        module = nn.ModuleDict({f"layer{i}": nn.Linear(a, b) for i, (a, b) in enumerate(((40, 30), (30, 20)))})
        modules.append(module.to(torch.bfloat16).requires_grad_(False))
        assert load_weights(modules[-1], stream, rules) == modules[-1].state_dict().keys()
    for name, value in modules[0].state_dict().items():
        assert value.equal(modules[1].state_dict()[name]), name


def test_no_more_is_read_than_the_ring_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever takes no more tensors has at most the ring's bytes read for it."""
    save_file({f"t{i:02}": torch.full((1000,), i, dtype=torch.uint8) for i in range(50)}, tmp_path / "m.safetensors")
    read, real = [], os.preadv

    def counted(file: int, buffers: list[memoryview], offset: int) -> int:
        read.append(real(file, buffers, offset))
        return read[-1]

    monkeypatch.setattr(os, "preadv", counted)
    with closing(read_ahead(tmp_path, block=1000, blocks=4, threads=3)) as stream:
        for taken in range(1, 6):
            next(stream)
            deadline = threading.Event()
            for _ in range(200):
                if sum(read) == (taken + 4) * 1000:
                    break
                deadline.wait(0.01)
            deadline.wait(0.02)
            assert sum(read) == (taken + 4) * 1000


def test_host_memory_is_the_ring(tmp_path: Path) -> None:
    """64 MB of tensors of 8 MB go through a ring of 2 MB: that and the one that was taken are in memory.

    In a process of its own whose allocator gives freed buffers back: by default it learns to keep those of the sizes
    that it has seen freed, tens of megabytes of them.
    """
    save_file({f"t{i}": torch.zeros(2 << 20) for i in range(8)}, tmp_path / "m.safetensors")
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    command = [sys.executable, "-c", PEAK, str(tmp_path)]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    assert 8 << 20 < int(done.stdout) < 16 << 20


def test_a_file_that_is_cut_short(tmp_path: Path) -> None:
    checkpoint(tmp_path, files=1)
    file = next(tmp_path.glob("*.safetensors"))
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(RemapError, match="its header needs") as raised:
        read_ahead(tmp_path)
    assert raised.value.code == "manifest_invalid"


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    file = tmp_path / "m.safetensors"
    save_file({f"t{i}": torch.zeros(1000) for i in range(9)}, file)
    before = threading.active_count()
    stream = read_ahead(tmp_path, block=100, blocks=2, threads=3)
    next(stream)
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(RemapError, match=r"t\d: .*m\.safetensors ends at byte [\d,]+ while it is read") as raised:
        list(stream)
    assert raised.value.code == "checkpoint_corrupt"
    assert threading.active_count() == before


def test_an_error_of_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"a": torch.zeros(10), "b": torch.zeros(1000)}, tmp_path / "m.safetensors")
    real = os.preadv

    def failing(file: int, buffers: list[memoryview], offset: int) -> int:
        if offset > 1000:
            raise OSError(5, "Input/output error")
        return real(file, buffers, offset)

    monkeypatch.setattr(os, "preadv", failing)
    with pytest.raises(
        RemapError, match=r"b: .*m\.safetensors cannot be read at byte .*: Input/output error"
    ) as raised:
        list(read_ahead(tmp_path, block=64, threads=4))
    assert raised.value.code == "checkpoint_unreadable" and raised.value.hint


def test_a_file_that_may_not_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"a": torch.zeros(10)}, tmp_path / "m.safetensors")
    stream = read_ahead(tmp_path)
    (tmp_path / "m.safetensors").unlink()
    with pytest.raises(RemapError, match=r"m\.safetensors cannot be opened: No such file") as raised:
        next(stream)
    assert raised.value.code == "checkpoint_unreadable"


def test_a_header_that_contradicts_itself(tmp_path: Path) -> None:
    header = (
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}'
    )
    (tmp_path / "m.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(12))
    with pytest.raises(RemapError, match=r"m\.safetensors: 'b' stands at 4; the tensors before it end at 8") as raised:
        read_ahead(tmp_path)
    assert raised.value.code == "manifest_invalid"


def test_a_stream_that_is_left_ends_its_threads(tmp_path: Path) -> None:
    save_file({f"t{i}": torch.zeros(1000) for i in range(9)}, tmp_path / "m.safetensors")
    before = threading.active_count()
    with closing(read_ahead(tmp_path, block=100, blocks=2, threads=4)) as stream:
        next(stream)
        assert threading.active_count() == before + 4
    assert threading.active_count() == before


@pytest.mark.parametrize("wrong", ["block", "blocks", "threads"])
def test_numbers_below_one_are_refused(tmp_path: Path, wrong: str) -> None:
    save_file({"a": torch.zeros(10)}, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=f"{wrong}=0"):
        read_ahead(tmp_path, **{wrong: 0})


@pytest.mark.gpu
def test_tensors_reach_a_gpu(tmp_path: Path) -> None:
    expected = checkpoint(tmp_path)
    for name, tensor in read_ahead(tmp_path, device="cuda", block=4096, blocks=3):
        assert tensor.is_cuda and tensor.dtype == expected[name].dtype
        values = tensor.cpu().reshape(-1).view(torch.uint8)
        assert values.equal(expected[name].reshape(-1).view(torch.uint8)), name
