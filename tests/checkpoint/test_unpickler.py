"""Checkpoints of trainers, of Python 2, and without checksums: kept values are converted, others are not built."""

from __future__ import annotations

import argparse
import collections
import io
import pickle
import re
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import load_file

from port_kit.checkpoint.convert import convert_file
from port_kit.checkpoint.pickle_reader import read_tables
from port_kit.errors import CheckpointError

WEIGHTS = {"w": torch.arange(6.0).reshape(2, 3), "b": torch.ones(3, dtype=torch.bfloat16)}


class Evil:
    """Object whose pickle runs a command when it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return os.system, (f"touch {self.marker}",)


def convert(path: Path, **options: Any) -> dict[str, torch.Tensor]:
    """Convert a checkpoint and load the result."""
    target = path.with_suffix(".safetensors")
    convert_file(path, target, **options)
    return load_file(target)


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """The same tensors."""
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


TRAINER = {
    "numpy scalar": numpy.float64(1.0),
    "numpy array": numpy.arange(3),
    "namespace": argparse.Namespace(a=1, b=[{2}]),
    "stream": io.BytesIO(b"x"),
    "set": {1, 2},
    "bytes": b"config",
    "device": torch.device("cpu"),
    "defaultdict": collections.defaultdict(list, {1: [2]}),
    "path": Path("x"),
    "complex": 1j,
    "tensor in an object": argparse.Namespace(t=torch.ones(4)),
    "dtype": torch.float16,
    "ordered": collections.OrderedDict({numpy.int64(3): 4}),
    "module": torch.nn.Linear(2, 2),
    "quantized": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
    "sparse": torch.ones(2, 2).to_sparse(),
}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        (name, options)
        for name in TRAINER
        for options in ({}, {"_use_new_zipfile_serialization": False}, {"pickle_protocol": 4})
        if name != "quantized" or "_use_new_zipfile_serialization" not in options  # torch writes no size there
    ],
)
def test_the_state_of_a_trainer_is_left_out_by_wrapper_or_by_name(
    tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    torch.save({"model": WEIGHTS, name: TRAINER[name]}, tmp_path / "a.pth", **options)
    assert_equal(convert(tmp_path / "a.pth", wrapper="model"), WEIGHTS)
    torch.save({**WEIGHTS, name: TRAINER[name]}, tmp_path / "b.pth", **options)
    assert_equal(convert(tmp_path / "b.pth", drop=[name]), WEIGHTS)
    with pytest.raises(CheckpointError) as caught:
        convert(tmp_path / "b.pth")
    assert caught.value.code in ("pickle_unsafe", "pickle_unsupported") and name in str(caught.value)


def test_dropped_values_may_be_malicious_and_kept_ones_may_not(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    torch.save({"model": WEIGHTS, "x": Evil(marker)}, tmp_path / "a.pth")
    assert_equal(convert(tmp_path / "a.pth", wrapper="model"), WEIGHTS)
    for value in ({**WEIGHTS, "x": Evil(marker)}, {**WEIGHTS, "x": [{"y": (Evil(marker),)}]}, Evil(marker)):
        torch.save(value, tmp_path / "a.pth")
        with pytest.raises(CheckpointError) as caught:
            convert(tmp_path / "a.pth")
        assert caught.value.code == "pickle_unsafe" and caught.value.details["found"] == "posix.system"
        with pytest.raises(CheckpointError):
            read_tables(tmp_path / "a.pth")
    assert not marker.exists()


@pytest.mark.parametrize(
    "body",
    [
        b"cos\nsystem\n(S'x'\ntR0}.",  # called, and thrown away
        b"cos\nsystem\n0}.",
        b"(S'x'\nios\nsystem\n0}.",
        b"(cos\nsystem\nS'x'\no0}.",
        b"}(S'a'\ncos\nsystem\n(S'x'\ntRS'a'\nNu.",  # overwritten
        b"}cos\nsystem\n(S'x'\ntRb.",  # the state of a dict
        b"\x80\x02ctorch\nfloat32\n(S'x'\ntR.",
        b"\x80\x02ctorch\nfloat32\n)\x81.",
        b"\x82\x01.",
        b"Px\n.",
    ],
)
def test_a_call_that_leaves_no_trace_in_the_result_is_refused(tmp_path: Path, body: bytes) -> None:
    with zipfile.ZipFile(tmp_path / "a.pth", "w") as made:
        made.writestr("x/data.pkl", body)
    with pytest.raises(CheckpointError) as caught:
        read_tables(tmp_path / "a.pth")
    assert caught.value.code == "pickle_unsafe"


def test_a_tensor_with_an_attribute_is_a_tensor(tmp_path: Path) -> None:
    tensor, parameter = torch.ones(2), torch.nn.Parameter(torch.ones(3))
    tensor.tag, parameter.tag = 1, {"a": 2}  # type: ignore[attr-defined]
    torch.save({"t": tensor, "p": parameter}, tmp_path / "a.pth")
    assert_equal(convert(tmp_path / "a.pth"), {"t": torch.ones(2), "p": torch.ones(3)})
    tensor.tag = numpy.float64(1)  # type: ignore[attr-defined]
    torch.save({"t": tensor}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError) as caught:
        convert(tmp_path / "a.pth")
    assert caught.value.code == "pickle_unsafe"


def test_a_name_to_drop_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    torch.save({"body": torch.ones(2), "head": torch.ones(3)}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError) as caught:
        convert(tmp_path / "a.pth", drop=["haed"])
    assert caught.value.code == "pickle_drop" and "head" in caught.value.hint
    assert not (tmp_path / "a.safetensors").exists()


def test_names_to_drop_may_lie_beside_the_wrapper(tmp_path: Path) -> None:
    """The wrapper selects first: what lies beside it is neither judged nor needs to be dropped, but may be."""
    path = tmp_path / "a.pth"
    torch.save({"model": WEIGHTS, "ema": WEIGHTS, "args": argparse.Namespace(lr=1)}, path)
    with pytest.raises(CheckpointError) as caught:
        convert(path)
    assert caught.value.code == "pickle_wrapper" and "--wrapper model" in caught.value.hint
    for drop in ([], ["args"], ["ema", "args"]):
        assert_equal(convert(path, wrapper="model", drop=drop), WEIGHTS)
    for absent in ("model", "lr"):  # the wrapper's own key, and a name that is nowhere
        with pytest.raises(CheckpointError) as caught:
            convert(path, wrapper="model", drop=[absent])
        assert caught.value.code == "pickle_drop" and "args" in caught.value.message


def test_up_to_date_is_the_same_content_by_the_same_options(tmp_path: Path) -> None:
    source, target = tmp_path / "a.pth", tmp_path / "a.safetensors"
    torch.save({"m": {"body": torch.ones(4), "head": torch.ones(2)}, "n": {"body": torch.zeros(4)}}, source)

    def again(**options: Any) -> bool:
        return not convert_file(source, target, **{"wrapper": "m", **options}).unchanged

    assert [again(), again(), again(drop=["head"]), again(drop=["head"]), again(), again(wrapper="n"), again()] == [
        *(True, False, True, False, True, True, True)
    ]
    for place in (10, -1, -20):
        data = bytearray(target.read_bytes())
        data[place] ^= 1
        target.write_bytes(data)
        assert again() and not again()
    target.write_bytes(target.read_bytes() + b"x")
    assert again()
    torch.save({"m": {"body": torch.ones(4), "head": torch.zeros(2)}}, source)
    assert again() and not again()


def test_a_checkpoint_without_checksums(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(WEIGHTS, tmp_path / "a.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    assert_equal(convert(tmp_path / "a.pth"), WEIGHTS)


def test_microscaling_dtypes(tmp_path: Path) -> None:
    scales = torch.arange(4, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    packed = torch.arange(8, dtype=torch.uint8).reshape(2, 4).view(torch.float4_e2m1fn_x2)
    torch.save({"scales": scales, "packed": packed}, tmp_path / "a.pth")
    convert_file(tmp_path / "a.pth", tmp_path / "a.safetensors")
    header = (tmp_path / "a.safetensors").read_bytes()
    assert b"F8_E8M0" in header and b'"F4","shape":[2,8]' in header
    assert header.endswith((bytes(range(8)) + bytes(range(4)), bytes(range(4)) + bytes(range(8))))


def python_2(tensors: dict[str, torch.Tensor]) -> bytes:
    """The old container as Python 2 wrote it: byte strings, long numbers, an OrderedDict from a list of pairs."""

    def text(value: str) -> bytes:
        return b"U" + bytes([len(value)]) + value.encode()

    def long(value: int) -> bytes:
        return b"\x8a\x04" + struct.pack("<i", value)

    storages = {str(94370880 + index): tensor for index, tensor in enumerate(tensors.values())}
    pairs = b""
    for name, (key, tensor) in zip(tensors, storages.items(), strict=True):
        kind = {torch.float32: "FloatStorage", torch.bfloat16: "BFloat16Storage"}[tensor.dtype]
        storage = b"(" + text("storage") + f"ctorch\n{kind}\n".encode() + text(key) + text("cpu")
        storage += long(tensor.numel()) + b"NtQ"
        shape, strides = (b"(" + b"".join(map(long, values)) + b"t" for values in (tensor.shape, tensor.stride()))
        pairs += (
            b"](" + text(name) + b"ctorch._utils\n_rebuild_tensor\n(" + storage + b"K\x00" + shape + strides + b"tRe"
        )
    state = (
        b"\x80\x02ccollections\nOrderedDict\nq\x01](" + pairs + b"e\x85Rq\x02}q\x03" + text("_metadata") + b"h\x01)Rsb."
    )
    head = b"".join(pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
    content = b"".join(
        struct.pack("<q", tensor.numel()) + tensor.contiguous().view(torch.uint8).numpy().tobytes()
        for tensor in tensors.values()
    )
    return head + state + pickle.dumps(list(storages), 2) + content


def test_a_checkpoint_of_python_2(tmp_path: Path) -> None:
    (tmp_path / "a.pth").write_bytes(python_2(WEIGHTS))
    assert_equal(convert(tmp_path / "a.pth"), WEIGHTS)


MEASURE = """
import re, sys
from port_kit.checkpoint.pickle_reader import read_tables
from port_kit.errors import CheckpointError
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) << 10
before = peak()
try:
    read_tables(sys.argv[1])
except CheckpointError as error:
    print(peak() - before, error.code)
"""
COUNT = 1_000_000
DENSE = {
    "lists": b"]\x94" * COUNT,
    "lists in lists": b"](" + (b"](" + b"]\x94" * 1000 + b"e") * (COUNT // 1000) + b"e",
    "dicts": b"}\x94" * COUNT,
    "tuples": b"N\x85" * COUNT,
    "numbers": b"".join(b"M" + struct.pack("<H", 300 + index % 60_000) for index in range(COUNT)),
    "texts": b"\x8c\x02ab" * COUNT,
    "memo": b"N" + b"".join(b"r" + struct.pack("<I", index * 7 + 5) for index in range(COUNT // 2)),
    "keys": b"}(" + b"".join(b"J" + struct.pack("<i", index) + b"N" for index in range(COUNT)) + b"u",
    "objects": b"ca\nb\n\x94" + b")\x81\x94h\x00" * (COUNT // 2),
}


@pytest.mark.parametrize("name", DENSE)
def test_memory_is_bounded_by_the_pickles_length(tmp_path: Path, name: str) -> None:
    with zipfile.ZipFile(tmp_path / "a.pth", "w") as made:
        made.writestr("a/data.pkl", b"\x80\x04" + DENSE[name] + b".")
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "a.pth")], capture_output=True, text=True, timeout=300
    )
    grown, code = done.stdout.split()
    assert int(grown) < 16 * len(DENSE[name]) and re.fullmatch("pickle_(unsupported|corrupt|unsafe)", code)
