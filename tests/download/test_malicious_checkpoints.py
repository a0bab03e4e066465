"""Checkpoints that try to hang, crash or exhaust the reader, or to make it write unreadable files: errors by code.

Each is converted in a process of its own, with bounded memory and time: some of these once ended the process itself.
"""

from __future__ import annotations

import io
import os
import pickle
import resource
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from port_kit.download import FileRule, Recipe, Repository, convert_file
from port_kit.errors import DownloadError
from port_kit.testing.hub import Hub
from tests.download.helpers import MODEL_INDEX, VAE, bring
from tests.helpers import raises

CONVERT = """
import sys
from port_kit.download import convert_file
from port_kit.errors import PortKitError
try:
    convert_file(sys.argv[1], sys.argv[2])
except PortKitError as error:
    print(error.code, len(str(error)))
"""
ORDERED_DICT = b"ccollections\nOrderedDict\n"


def text(value: bytes) -> bytes:
    """A string of a pickle."""
    return b"X" + struct.pack("<I", len(value)) + value


def number(value: int) -> bytes:
    """An integer of a pickle, of any size up to 255 bytes."""
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def lengths(values: tuple[int, ...]) -> bytes:
    """A tuple of numbers."""
    return b"(" + b"".join(map(number, values)) + b"t"


def tensor(shape: tuple[int, ...], strides: tuple[int, ...], key: bytes = b"0", count: int = 12) -> bytes:
    """A float32 view of a storage of ``count`` elements."""
    storage = b"(" + text(b"storage") + b"ctorch\nFloatStorage\n" + text(key) + text(b"cpu") + number(count) + b"tQ"
    geometry = number(0) + lengths(shape) + lengths(strides)
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + geometry + b"\x89" + ORDERED_DICT + b")RtR"


def state(**tensors: bytes) -> bytes:
    """The pickle of a state dict."""
    return b"\x80\x02}(" + b"".join(text(name.encode()) + data for name, data in tensors.items()) + b"u."


def archive(data: bytes, storages: int = 1) -> bytes:
    """A zip container with storages of 48 bytes."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as made:
        made.writestr("x/data.pkl", data)
        made.writestr("x/byteorder", b"little")
        for index in range(storages):
            made.writestr(f"x/data/{index}", bytes(48))
    return stream.getvalue()


def overlapping() -> bytes:
    """Two storages of a directory that lie in the same bytes."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as made:
        made.writestr("x/data.pkl", state(a=tensor((12,), (1,)), b=tensor((12,), (1,), b"1")))
        for index in range(2):
            made.writestr(f"x/data/{index}", bytes(48))
        made.infolist()[2].header_offset = made.infolist()[1].header_offset
    return stream.getvalue()


def legacy(keys: list[str], *counts: int) -> bytes:
    """The legacy container with one tensor, a list of storages, and the preceding lengths."""
    head = b"".join(pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
    body = b"".join(struct.pack("<q", count) + bytes(48) for count in counts)
    return head + state(a=tensor((12,), (1,))) + pickle.dumps(keys, 2) + body


def many_keys(count: int, value: bytes = b"N") -> bytes:
    """Items for a dict with integer keys."""
    return b"".join(b"J" + struct.pack("<i", index) + value for index in range(count))


FLOOD = 2**61 - 1  # integers with the same hash
HOSTILE = {
    "a key so deep that hashing it overflows the stack": (
        archive(b"\x80\x02})" + b"\x85" * 500_000 + b"Ns."),
        "unsupported",
    ),
    "a key that takes for ever to hash": (archive(b"\x80\x02})" + b"2\x86" * 200 + b"Ns."), "unsupported"),
    "a key too long to print": (
        archive(b"\x80\x02}\x8b" + struct.pack("<I", 5000) + b"\x01" * 5000 + b"Ns."),
        "unsupported",
    ),
    "keys with one hash": (
        archive(b"\x80\x02}(" + b"".join(number(FLOOD * n) + b"N" for n in range(1, 20_000)) + b"u."),
        "unsupported",
    ),
    "memo places with one hash": (
        archive(b"\x80\x02N" + b"".join(b"p%d\n" % (FLOOD * n) for n in range(1, 20_000)) + b"."),
        "corrupt",
    ),
    "a type too deep to print": (
        archive(b"\x80\x02ctorch._utils\n_rebuild_tensor_v3\n(NNNNNN)" + b"\x85" * 100_000 + b"tR."),
        "unsupported",
    ),
    "a dict copied a thousand times": (
        archive(
            b"\x80\x02}(" + many_keys(100_000) + b"uq\x00" + ORDERED_DICT + b"q\x01" + b"h\x01h\x00\x85R" * 3000 + b"."
        ),
        "unsafe",
    ),
    "a string copied a thousand times": (
        archive(b"\x80\x02" + text(b"x" * 3_000_000) + b"q\x00ctorch\nSize\nq\x01" + b"h\x01h\x00\x85R" * 3000 + b"."),
        "unsafe",
    ),
    "long paths to a hundred thousand dicts": (
        archive(b"\x80\x02}" + text(b"k" * 60_000) + b"}(" + many_keys(100_000, b"}") + b"us."),
        "unsupported",
    ),
    "four bytes that claim to be terabytes": (archive(state(a=tensor((1 << 40,), (0,)))), "unsupported"),
    "four bytes with billions of rows": (archive(state(a=tensor((1 << 36, 2), (0, 1)))), "unsupported"),
    "a shape that overflows": (archive(state(a=tensor((1 << 61, 1 << 61, 0), (1, 1, 1)))), "corrupt"),
    "a name that is half a letter": (
        archive(b"\x80\x02}(" + text(b"\xed\xa0\x80") + tensor((3,), (1,)) + b"u."),
        "unsupported",
    ),
    "the name of the header's own entry": (archive(state(__metadata__=tensor((3,), (1,)))), "unsupported"),
    "storages in the same bytes": (overlapping(), "corrupt"),
    "a legacy storage listed twice": (legacy(["0", "0"], 12, 12), "corrupt"),
    "a legacy storage of another length": (legacy(["0"], 13), "corrupt"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_checkpoint_is_refused_by_name(tmp_path: Path, name: str) -> None:
    content, kind = HOSTILE[name]
    (tmp_path / "x.pth").write_bytes(content)

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))

    command = [sys.executable, "-c", CONVERT, str(tmp_path / "x.pth"), str(tmp_path / "x.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, preexec_fn=limit, check=False)
    assert done.returncode == 0, done.stderr
    code, length = done.stdout.split()
    assert code == f"pickle_{kind}" and int(length) < 1000
    assert not (tmp_path / "x.safetensors").exists()


def test_the_builders_above_make_what_can_be_read(tmp_path: Path) -> None:
    """Valid content is accepted, so the errors above are due to the content."""
    (tmp_path / "x.pth").write_bytes(archive(state(a=tensor((12,), (1,)), b=tensor((3, 4), (1, 3), b"1")), storages=2))
    (tmp_path / "y.pth").write_bytes(legacy(["0"], 12))
    for name, count in (("x", 2), ("y", 1)):
        assert convert_file(tmp_path / f"{name}.pth", tmp_path / f"{name}.safetensors").tensors == count
        assert len(load_file(tmp_path / f"{name}.safetensors")) == count


def test_wide_and_long_views_are_written_in_pieces(tmp_path: Path) -> None:
    """Rows of more than a batch, and more rows than anybody would list: as torch sees them."""
    wide = torch.arange(4, dtype=torch.int8).reshape(2, 2, 1).expand(2, 2, 700_000)
    state_dict = {"wide": wide, "long": torch.randn(3, 200_000).t()}
    torch.save(state_dict, tmp_path / "x.pth")
    convert_file(tmp_path / "x.pth", tmp_path / "x.safetensors")
    found = load_file(tmp_path / "x.safetensors")
    assert all(torch.equal(found[name], value) for name, value in state_dict.items())


def test_a_real_torchscript_archive_is_named(tmp_path: Path) -> None:
    traced = torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2))
    traced.save(tmp_path / "x.pt")
    with raises("pickle_unsupported"):
        convert_file(tmp_path / "x.pt", tmp_path / "x.safetensors")


@pytest.mark.parametrize("place", ["object", "keys", "bytes"])
def test_evil_in_a_later_or_inner_pickle(tmp_path: Path, place: str) -> None:
    marker = tmp_path / "marker"
    evil = b"cos\nsystem\n(S'touch " + str(marker).encode() + b"'\ntR."
    head = b"".join(pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
    inner = b"\x80\x02cpickle\nloads\n" + b"T" + struct.pack("<i", len(evil)) + evil + b"\x85R."
    content = {"object": head + evil, "keys": head + state(a=tensor((12,), (1,))) + evil, "bytes": archive(inner)}[
        place
    ]
    (tmp_path / "x.pth").write_bytes(content)
    with raises("pickle_unsafe") as caught:
        convert_file(tmp_path / "x.pth", tmp_path / "x.safetensors")
    assert caught.value.details["found"] == ("pickle.loads" if place == "bytes" else "os.system")
    assert not marker.exists()


def test_a_checkpoint_of_which_only_the_middle_is_unaligned(tmp_path: Path) -> None:
    """The sampled tensors have torch's offsets; the one that has not is found, and the layout is exact."""
    torch.save({f"t{n}": torch.randn(10 + n) for n in range(20)}, tmp_path / "x.pth")
    with zipfile.ZipFile(tmp_path / "x.pth") as made:
        entries = {info.filename: made.read(info) for info in made.infolist()}
    with zipfile.ZipFile(tmp_path / "x.pth", "w") as made:
        for name, content in entries.items():
            entry = zipfile.ZipInfo(name)
            start = made.fp.tell() + 30 + len(name) + 4  # type: ignore[union-attr]
            padding = -start % 64 + (32 if name.endswith("/data/7") else 0)
            entry.extra = b"FB" + struct.pack("<H", padding) + bytes(padding)
            made.writestr(entry, content)
    recipe = Recipe("r", (Repository(VAE, (FileRule("x.pth", "vae", convert=True),)),), MODEL_INDEX)
    with Hub({VAE: {"x.pth": tmp_path / "x.pth"}}) as hub:
        bring(recipe, tmp_path / "m", hub)
        assert len(hub.gets()) > 2
    assert len(load_file(tmp_path / "m/vae/x.safetensors")) == 20


def test_targets_that_are_no_plain_files(tmp_path: Path) -> None:
    """A device or a pipe in the target's place is not replaced; names may be as long as the system's."""
    torch.save({"a": torch.ones(2)}, tmp_path / "x.pth")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for target in (tmp_path / "pipe", tmp_path / "folder", tmp_path / "x.pth/below", tmp_path / ("n" * 300)):
        with pytest.raises(DownloadError) as caught:
            convert_file(tmp_path / "x.pth", target)
        assert caught.value.code == "output_dir"
    assert (tmp_path / "pipe").is_fifo() and (tmp_path / "folder").is_dir()
    for name in ("n" * 255, "a[1]*?.safetensors", "ünï cödé " * 12):
        assert convert_file(tmp_path / "x.pth", tmp_path / name).tensors == 1
    assert sorted(path.name[0] for path in tmp_path.iterdir()) == ["a", "f", "n", "p", "x", "ü"]


def test_a_foreign_file_in_the_targets_place_is_replaced(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "x.pth")
    for number_, header in enumerate(
        (b'{"__metadata__":{},"a":5}', b'{"__metadata__":{"port_kit_source":5},"a":{}}', b"[]")
    ):
        target = tmp_path / f"{number_}.safetensors"
        target.write_bytes(len(header).to_bytes(8, "little") + header)
        assert not convert_file(tmp_path / "x.pth", target).unchanged and load_file(target)["a"].sum() == 2
