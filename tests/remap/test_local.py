"""Loading from files: regions straight into memory, bounded buffers, and an error for every way to fail."""

from __future__ import annotations

import json
import os
import threading
import warnings
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from port_kit.checkpoint.safetensors_file import SafetensorsFile
from port_kit.errors import RemapError
from port_kit.manifest import Manifest
from port_kit.regions import Region, region_index, region_shape
from port_kit.remap import Op, Rule, RuleSet, load_weights
from port_kit.remap.local import Ring, load_local
from port_kit.remap.transforms import transform

SAME = RuleSet("same", (Rule(r"(.+)", r"\1"),))
DTYPES = (torch.bfloat16, torch.float32, torch.float16, torch.int64, torch.bool, torch.float8_e4m3fn, torch.uint8)
BLOCK = "port_kit.checkpoint.safetensors_file.BLOCK"


def module_like(tensors: dict[str, Tensor], dtype: torch.dtype | None = None) -> nn.Module:
    """A module of parameters and buffers with these names, all bytes set."""
    root = nn.Module()
    for name, tensor in tensors.items():
        made = torch.empty(tensor.shape, dtype=dtype or tensor.dtype)
        if made.numel():
            made.reshape(-1).view(torch.uint8).fill_(255)
        root.register_buffer(name, made)
    return root


def assert_equal(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    for name, buffer in module.named_buffers():
        one, other = (tensor.reshape(-1).view(torch.uint8) for tensor in (buffer, tensors[name].to(buffer.dtype)))
        assert torch.equal(one, other), name


@pytest.fixture
def many(tmp_path: Path) -> dict[str, Tensor]:
    """Two files of tensors of many sizes and dtypes, some of many blocks, one of none."""
    random = torch.Generator().manual_seed(0)
    everything: dict[str, Tensor] = {}
    for number in range(2):
        tensors = {}
        for index, shape in enumerate([(3,), (), (17, 5), (0, 4), (1000, 33), (1,), (64, 64)] * 2):
            values = torch.randint(0, 100, shape, generator=random)
            tensors[f"file{number}_t{index}"] = values.to(DTYPES[(index + number) % len(DTYPES)])
        save_file(tensors, tmp_path / f"model-{number}.safetensors")
        everything |= tensors
    return everything


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("block", [7, 4096, 1 << 24])
def test_tensors_of_all_sizes_and_dtypes(
    tmp_path: Path, many: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch, block: int, threads: int
) -> None:
    monkeypatch.setattr(BLOCK, block)
    module = module_like(many)
    done = load_local(module, tmp_path, SAME, threads=threads, prefix="part.")
    assert done.loaded == {f"part.{name}" for name in many} and not done.read_whole
    assert done.bytes_read == done.bytes_whole == sum(tensor.nbytes for tensor in many.values())
    assert_equal(module, many)


def read_region(file: SafetensorsFile, region: Region, into: torch.Tensor, *, mapped: bool) -> None:
    """Read a region of the tensor ``w``, from the mapping or without it."""
    if mapped:
        for part, piece in file.pieces("w", region, into):
            part.copy_(piece)
    else:
        for read in file.reads("w", region, into):
            read()


@pytest.mark.parametrize("mapped", [True, False])
@pytest.mark.parametrize("block", [1, 100, 1 << 20])
@pytest.mark.parametrize(
    "region",
    [
        ((0, 6), (0, 4), (0, 5)),
        ((2, 5), (0, 4), (0, 5)),
        ((2, 3), (1, 3), (0, 5)),
        ((0, 6), (1, 3), (0, 5)),
        ((1, 6), (0, 4), (2, 3)),
    ],
)
def test_regions_are_read_into_any_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int, region: tuple, mapped: bool
) -> None:
    """Into memory of its own, into rows of a larger tensor, and into columns of one."""
    monkeypatch.setattr(BLOCK, block)
    values = torch.arange(120, dtype=torch.int16).reshape(6, 4, 5)
    save_file({"first": torch.zeros(3), "w": values}, tmp_path / "m.safetensors")
    file = SafetensorsFile(tmp_path / "m.safetensors", "m.safetensors", Manifest.from_safetensors(tmp_path))
    expected = values[region_index(region)]
    for axis in (0, 2):
        extents = [extent + 2 * (at == axis) for at, extent in enumerate(region_shape(region))]
        room = torch.full(extents, -1, dtype=torch.int16)
        into = room.narrow(axis, 1, extents[axis] - 2)
        read_region(file, region, into, mapped=mapped)
        assert torch.equal(into, expected)
        assert (room == -1).sum() == room.numel() - expected.numel()
    file.close()


@pytest.mark.parametrize(
    ("rule", "shape", "result"),
    [
        (Rule("x", "y", op="transpose"), (6, 4), lambda x: x.T),
        (Rule("x", "y", op=Op.of("rearrange", pattern="a b c -> a (b c)")), (4, 3, 2), lambda x: x.reshape(4, 6)),
        (Rule("x", "y", op=Op.of("reorder", dim=0)), (4, 6), lambda x: torch.cat([x[2:], x[:2]])),
        (Rule("x", "y", op=Op.of("rearrange", pattern="(a b) c -> (b a) c", sizes={"a": 2})), (4, 6), None),
        (Rule("x", "y", op=Op.of("cast", dtype="bfloat16")), (4, 6), lambda x: x.bfloat16().float()),
        (Rule("x", "y", op=[Op.of("reshape", shape=(24,)), Op.of("reshape", shape=(4, 6))]), (2, 12), None),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_files_and_streams_give_the_same_result(
    tmp_path: Path, rule: Rule, shape: tuple[int, ...], result: Callable[[Tensor], Tensor] | None, dtype: torch.dtype
) -> None:
    rules, given = RuleSet("one", (rule,)), torch.randn(shape)
    save_file({"x": given}, tmp_path / "m.safetensors")
    streamed, local = (module_like({"y": torch.zeros(4, 6)}, dtype) for _ in range(2))
    load_weights(streamed, [("x", given)], rules)
    assert load_local(local, tmp_path, rules).bytes_read == given.nbytes
    assert torch.equal(streamed.y, local.y)
    if result is not None:
        assert torch.equal(local.y, result(given).to(dtype))


def test_transforms_of_several_sources_find_their_partners_in_other_files(tmp_path: Path) -> None:
    g, v = torch.rand(4, 1, 1), torch.randn(4, 3, 2)
    save_file({"a.weight_v": v}, tmp_path / "1.safetensors")
    save_file({"a.weight_g": g}, tmp_path / "2.safetensors")
    module = module_like({"w": v})
    rules = RuleSet("wn", (Rule(r"a\.weight_(g|v)", "w", shard=r"\1", op="weight_norm"),))
    load_local(module, tmp_path, rules)
    assert torch.equal(module.w, torch._weight_norm(v, g, 0))


def test_a_source_of_two_targets_fills_both(tmp_path: Path) -> None:
    given = torch.randn(4, 3)
    save_file({"x": given}, tmp_path / "m.safetensors")
    module = module_like({"y": given, "z": given.T.contiguous()})
    done = load_local(module, tmp_path, RuleSet("two", (Rule("x", "y"), Rule("x", "z", op="transpose"))))
    assert torch.equal(module.y, given) and torch.equal(module.z, given.T) and done.bytes_read == 2 * given.nbytes


@transform("local_weighted_sum", shape=lambda parts, args: parts["a"], roles=("a", "b"))
def weighted_sum(parts: dict, args: dict) -> Tensor:
    return parts["a"] + 10 * parts["b"]


def test_one_source_may_be_several_parts_of_a_transform(tmp_path: Path) -> None:
    given = {"x": torch.randn(4, 3), "y": torch.randn(2, 3)}
    save_file(given, tmp_path / "m.safetensors")
    split = (Op.of("split", dim=0), Op.of("local_weighted_sum"))
    rules = RuleSet(
        "parts",
        (
            Rule("x", ("z", "z"), shard=("a", "b"), op=split),
            Rule("y", "w", shard="a", op="local_weighted_sum"),
            Rule("y", "w", shard="b", op="local_weighted_sum"),
        ),
    )
    wanted = {"z": given["x"][:2] + 10 * given["x"][2:], "w": 11 * given["y"]}
    local, streamed = (module_like(wanted) for _ in range(2))
    load_local(local, tmp_path, rules)
    load_weights(streamed, given.items(), rules, folder=tmp_path)
    for module in (local, streamed):
        for name, value in wanted.items():
            torch.testing.assert_close(getattr(module, name), value)


def test_an_index_of_files_in_folders(tmp_path: Path) -> None:
    """The files have one name in two folders."""
    tensors = {f"{layer}_w": torch.randn(5, 4) for layer in "01"}
    for layer in "01":
        (tmp_path / layer).mkdir()
        save_file({f"{layer}_w": tensors[f"{layer}_w"]}, tmp_path / layer / "model.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {name: f"{name[0]}/model.safetensors" for name in tensors}}))
    for path in (index, tmp_path):
        module = module_like(tensors)
        load_local(module, path, SAME)
        assert_equal(module, tensors)


def test_a_column_of_a_huge_file_needs_no_memory(tmp_path: Path) -> None:
    """A sparse file of a terabyte, of which the last row and the last column are read."""
    extent = 1 << 20
    header = json.dumps({"w": {"dtype": "U8", "shape": [extent] * 2, "data_offsets": [0, extent**2]}}).encode()
    with (tmp_path / "m.safetensors").open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        stream.truncate(8 + len(header) + extent**2)
        stream.seek(-3, 2)
        stream.write(b"abc")
    file = SafetensorsFile(tmp_path / "m.safetensors", "m.safetensors", Manifest.from_safetensors(tmp_path))
    row, column = torch.ones(1, extent, dtype=torch.uint8), torch.ones(9, 1, dtype=torch.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for region, into in (
            (((extent - 1, extent), (0, extent)), row),
            (((extent - 9, extent), (extent - 1, extent)), column),
        ):
            read_region(file, region, into, mapped=True)
    file.close()
    assert bytes(row[0, -4:].tolist()) == b"\0abc" and bytes(column[-2:, 0].tolist()) == b"\0c"


@pytest.mark.parametrize("mode", [nullcontext, torch.inference_mode])
def test_odd_addresses_and_inference_mode(tmp_path: Path, mode: Callable[[], AbstractContextManager[object]]) -> None:
    """A scalar, an empty tensor, and numbers at odd addresses; buffers that were made in inference mode."""
    values = {
        "odd": torch.zeros(3).bool(),
        "a": torch.tensor(3.0),
        "b": torch.zeros(3, 0),
        "c": torch.arange(5.0).double(),
        "t": torch.randn(3, 2),
    }
    data, entries = b"", {}
    for name, value in values.items():
        raw = value.numpy().tobytes()
        dtype = {1: "BOOL", 4: "F32", 8: "F64"}[value.element_size()]
        entries[name] = {"dtype": dtype, "shape": list(value.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    header = json.dumps(entries).encode()
    (tmp_path / "m.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data)
    with mode():
        module = module_like(values | {"t": values["t"].T.contiguous()})
        rules = RuleSet("odd", (Rule("t", "t", op="transpose"), Rule(r"(odd|a|b|c)", r"\1")))
        assert load_local(module, tmp_path, rules, threads=3).bytes_read == len(data)
        assert_equal(module, values | {"t": values["t"].T.contiguous()})


@given(st.lists(st.integers(1, 300), max_size=80), st.randoms(use_true_random=False))
def test_spans_of_a_ring_never_overlap_and_are_used_again(sizes: list[int], random: Random) -> None:
    ring, held = Ring(1000), deque[tuple[int, int]]()
    for size in sizes:
        while (start := ring.take(size)) is None:
            assert held, "an empty ring has room for everything"
            held.popleft()
            ring.give_back()
        assert start % 64 == 0 and start + size <= 1000
        assert all(stop <= start or start + size <= low for low, stop in held)
        held.append((start, start + size))
        if held and random.random() < 0.3:
            held.popleft()
            ring.give_back()


# -- errors --------------------------------------------------------------------------------------------------------


def test_a_file_that_was_truncated_before(tmp_path: Path, many: dict[str, Tensor]) -> None:
    file = tmp_path / "model-0.safetensors"
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(RemapError) as raised:
        load_local(module_like(many), tmp_path, SAME)
    assert raised.value.code == "manifest_invalid"


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {f"t{at}": torch.zeros(1000) for at in range(9)}
    path = tmp_path / "m.safetensors"
    save_file(tensors, path)
    real, threads = SafetensorsFile.check_size, threading.active_count()

    def shrinking(*arguments: Any) -> None:
        os.truncate(path, 9000)
        real(*arguments)

    monkeypatch.setattr(SafetensorsFile, "check_size", shrinking)
    with pytest.raises(RemapError) as raised:
        load_local(module_like(tensors), tmp_path, SAME, threads=3)
    assert raised.value.code == "checkpoint_corrupt" and "m.safetensors" in raised.value.message
    assert threading.active_count() == threads


@pytest.mark.parametrize("fault", ["error", "end"])
def test_a_disk_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    def failing(file: int, buffers: list[memoryview], offset: int) -> int:
        if fault == "end":
            return 0
        raise OSError(5, "Input/output error")

    save_file({"w": torch.zeros(4, 3)}, tmp_path / "m.safetensors")
    file = SafetensorsFile(tmp_path / "m.safetensors", "m.safetensors", Manifest.from_safetensors(tmp_path))
    monkeypatch.setattr(os, "preadv", failing)
    with pytest.raises(RemapError) as raised:
        for read in file.reads("w", ((0, 4), (0, 3)), torch.ones(4, 3)):
            read()
    assert raised.value.code == {"error": "checkpoint_unreadable", "end": "checkpoint_corrupt"}[fault]
    assert "m.safetensors" in raised.value.message


@pytest.mark.parametrize("replace", [True, False])
def test_a_file_that_changes_after_its_header_was_read(tmp_path: Path, replace: bool) -> None:
    """Another file of the same size, whose tensors are at other offsets; or none."""
    path, other = tmp_path / "m.safetensors", tmp_path / "other"
    save_file({"a": torch.zeros(4), "b": torch.ones(4)}, path)
    source = Manifest.from_safetensors(path)
    save_file({"b": torch.ones(4), "a": torch.zeros(4)}, other)
    if replace:
        other.replace(path)
    else:
        path.unlink()
    with pytest.raises(RemapError) as raised:
        SafetensorsFile(path, path.name, source)
    assert raised.value.code == ("manifest_invalid" if replace else "checkpoint_unreadable")


def test_no_threads_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="threads=0"):
        load_local(nn.Module(), tmp_path, SAME, threads=0)


@pytest.mark.parametrize("good", [True, False])
def test_torch_keeps_its_number_of_threads(tmp_path: Path, many: dict[str, Tensor], good: bool) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        if not good:
            many["file0_t0"] = torch.zeros(4)
        with nullcontext() if good else pytest.raises(RemapError):
            load_local(module_like(many), tmp_path, SAME, threads=2)
        assert torch.get_num_threads() == 3
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(torch.get_num_threads).result(timeout=60) == 3
    finally:
        torch.set_num_threads(before)


def test_a_cast_that_overflows_is_an_error_that_names_the_tensor(tmp_path: Path) -> None:
    save_file({"big": torch.tensor([1.0, 1e6]), "fine": torch.tensor([float("inf"), 1.0])}, tmp_path / "m.safetensors")
    with pytest.raises(RemapError) as raised:
        load_local(module_like({"big": torch.zeros(2), "fine": torch.zeros(2)}, torch.float16), tmp_path, SAME)
    problems = raised.value.details["problems"]
    assert [(problem["code"], problem["source"]) for problem in problems] == [("remap_overflow", "big")]


@pytest.mark.gpu
def test_tensors_reach_a_gpu(tmp_path: Path, many: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    for block, window in ((4096, 20_000), (1 << 24, 1 << 28)):
        monkeypatch.setattr(BLOCK, block)
        monkeypatch.setattr("port_kit.remap.local.WINDOW", window)
        monkeypatch.setattr("port_kit.remap.local.BLOCK", block)
        module = module_like(many).cuda()
        assert load_local(module, tmp_path, SAME).bytes_read == sum(tensor.nbytes for tensor in many.values())
        assert_equal(module.cpu(), many)
