"""Torch checkpoints read without torch: the same tables, and no code executed."""

from __future__ import annotations

import io
import os
import pickle
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from port_kit.checkpoint.pickle_reader import check_offsets, read_tables
from port_kit.errors import CheckpointError, PortKitError
from tests.helpers import raises

LEGACY = {"_use_new_zipfile_serialization": False}


def save(value: object, path: Path, *, legacy: bool = False) -> Path:
    """torch.save in one of its two containers."""
    torch.save(value, path, **(LEGACY if legacy else {}))
    return path


def with_pickle(path: Path, data: bytes) -> Path:
    """A checkpoint of one tensor whose pickle is another one."""
    save({"a": torch.ones(2)}, path)
    with zipfile.ZipFile(path) as archive:
        entries = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, data if name.endswith("data.pkl") else content)
    return path


class Call:
    """Pickles as a call."""

    def __init__(self, function: Callable[..., Any], *arguments: object) -> None:
        self._call = (function, arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return self._call


def by_name(module: str, name: str, *arguments: object) -> bytes:
    """The pickle of a call of anything that can be named, whether it exists here or not."""
    return (
        pickle.PROTO
        + b"\x02"
        + pickle.GLOBAL
        + f"{module}\n{name}\n".encode()
        + pickle.dumps(tuple(arguments), 2)[2:-1]
        + pickle.REDUCE
        + pickle.STOP
    )


def gadgets(marker: Path) -> dict[str, bytes]:
    """Pickles that would leave a marker, or load code, in anything that executes them."""
    command = f"touch {marker}"
    code = f"open({str(marker)!r}, 'w')"
    return {
        "os.system": pickle.dumps(Call(os.system, command)),
        "builtins.eval": by_name("builtins", "eval", code),
        "builtins.exec": by_name("builtins", "exec", code),
        "builtins.getattr": by_name("builtins", "getattr", "a", "b"),
        "subprocess.Popen": by_name("subprocess", "Popen", command),
        "importlib.import_module": by_name("importlib", "import_module", "antigravity"),
        "torch.hub.load": by_name("torch.hub", "load", "evil/repo", "model"),
        "torch.utils.cpp_extension.load": by_name("torch.utils.cpp_extension", "load", "n", "x.cpp"),
        "logging.config.dictConfig": by_name("logging.config", "dictConfig", {}),
        "linecache.getlines": by_name("linecache", "getlines", "/etc/passwd"),
        "unittest.main": by_name("unittest", "main"),
        "runpy.run_path": by_name("runpy", "run_path", "x.py"),
        "torch.load": by_name("torch", "load", "other.pth"),
        "numpy scalar": by_name("numpy.core.multiarray", "scalar"),
        "argparse.Namespace": by_name("argparse", "Namespace"),
        "a module": by_name("torch.nn.modules.linear", "Linear"),
        "stacked name": b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.",
        "instance": b"(S'true'\nios\nsystem\n.",
        "object": b"(cos\nsystem\nS'true'\no.",
        "new object": b"\x80\x02cos\nsystem\n)\x81.",
        "extension": b"\x80\x02\x82\x01.",
        "a call of a dict": b"\x80\x02})R.",
        "state of a list": b"\x80\x02]}b.",
        "persistent text": b"Pstorage\n.",
    }


NAMES = sorted(gadgets(Path("x")))


@pytest.mark.parametrize("place", ["zip", "after stop", "legacy"])
@pytest.mark.parametrize("name", NAMES)
def test_evil_pickles_are_refused_by_name(tmp_path: Path, name: str, place: str) -> None:
    marker = tmp_path / "marker"
    data = gadgets(marker)[name]
    path = tmp_path / "evil.pth"
    if place == "zip":
        with_pickle(path, data)
    elif place == "after stop":
        with_pickle(path, pickle.dumps({}, 2) + data)
    else:
        path.write_bytes(pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + data)
    with pytest.raises(CheckpointError) as caught:
        read_tables(path)
    assert caught.value.code in ("pickle_unsafe", "pickle_corrupt", "checkpoint_format")
    if "." in name and place == "zip":
        assert name.removeprefix("builtins.").split(".")[-1] in caught.value.message
    assert not marker.exists()


def test_an_evil_value_inside_a_good_checkpoint(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    save({"a": torch.ones(2), "b": {"c": Call(os.system, f"touch {marker}")}}, tmp_path / "x.pth")
    with raises("pickle_unsafe", "system"):
        read_tables(tmp_path / "x.pth")
    assert not marker.exists()


def rezip(path: Path, change: Callable[[dict[str, bytes]], dict[str, bytes]], **options: Any) -> None:
    """Write an archive anew with other entries."""
    with zipfile.ZipFile(path) as archive:
        entries = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, content in change(entries).items():
            archive.writestr(name, content)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda entries: {**entries, "other/data.pkl": b""}, "pickle_unsafe"),
        (lambda entries: {**entries, "../escape": b""}, "pickle_unsafe"),
        (lambda entries: {**entries, "x/code/a.py": b""}, "pickle_unsupported"),
        (lambda entries: {**entries, "x/constants.pkl": b""}, "pickle_unsupported"),
        (lambda entries: {**entries, "x/byteorder": b"big"}, "pickle_unsupported"),
        (lambda entries: {k: v for k, v in entries.items() if not k.endswith("data.pkl")}, "checkpoint_format"),
        (lambda entries: {k: v for k, v in entries.items() if "/data/" not in k}, "pickle_corrupt"),
        (lambda entries: {k: v[:4] if "/data/" in k else v for k, v in entries.items()}, "pickle_corrupt"),
    ],
)
def test_odd_archives_are_refused(
    tmp_path: Path, change: Callable[[dict[str, bytes]], dict[str, bytes]], code: str
) -> None:
    path = save({"a": torch.ones(2)}, tmp_path / "x.pth")
    rezip(path, change)
    with pytest.raises(CheckpointError) as caught:
        read_tables(path)
    assert caught.value.code == code


def test_compressed_and_doubled_entries_are_refused(tmp_path: Path) -> None:
    path = save({"a": torch.ones(2)}, tmp_path / "x.pth")
    rezip(path, lambda entries: entries, compression=zipfile.ZIP_DEFLATED)
    with raises("pickle_unsupported", "x/data.pkl"):
        read_tables(path)
    path = save({"a": torch.ones(2)}, tmp_path / "y.pth")
    with pytest.warns(UserWarning), zipfile.ZipFile(path, "a") as archive:
        archive.writestr("y/data.pkl", b"")
    with raises("pickle_unsafe", "y.pth"):
        read_tables(path)


@pytest.mark.parametrize(
    ("content", "code", "names"),
    [
        (b"", "checkpoint_format", ()),
        (b"<!DOCTYPE html><html>404</html>", "checkpoint_format", ("HTML",)),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "checkpoint_format", ("LFS",)),
        (b'{"error": "Repository not found"}', "checkpoint_format", ("JSON",)),
        (b"x" * 257 + b"ustar" + b"x" * 300, "checkpoint_format", ("tar",)),
        (b"\x1f\x8b" + b"x" * 600, "checkpoint_format", ("gzip",)),
        (b"\x10\x00\x00\x00\x00\x00\x00\x00{" + b" " * 600, "checkpoint_format", ("safetensors",)),
        (b"GGUF" + b"x" * 600, "checkpoint_format", ("GGUF",)),
        (b"unheard of" + b"x" * 600, "checkpoint_format", ("unheard ",)),
        (pickle.dumps({"a": 1}), "pickle_corrupt", ()),
    ],
)
def test_a_file_of_another_format_is_named(tmp_path: Path, content: bytes, code: str, names: tuple[str, ...]) -> None:
    (tmp_path / "x.pth").write_bytes(content)
    with raises(code, "x.pth", *names):
        read_tables(tmp_path / "x.pth")


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("keep", [0.3, 0.9, 0.999])
def test_a_cut_checkpoint_is_damaged(tmp_path: Path, legacy: bool, keep: float) -> None:
    path = save({"a": torch.randn(100, 100), "b": torch.randn(1000)}, tmp_path / "x.pth", legacy=legacy)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(CheckpointError) as caught:
        read_tables(path)
    assert caught.value.code == "pickle_corrupt"


def test_wrappers_are_named(tmp_path: Path) -> None:
    state = torch.nn.Linear(2, 3).state_dict()
    path = save({"app": {"model": state}, "ema": state, "epoch": 3}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError) as caught:
        read_tables(path)
    assert caught.value.code == "pickle_wrapper" and set(caught.value.details["wrappers"]) == {"app.model", "ema"}
    assert set(read_tables(path, "app.model").tensors) == {"weight", "bias"}
    with raises("pickle_wrapper", "app", "ema", "epoch"):
        read_tables(path, "generator")


def test_sources_of_all_kinds(tmp_path: Path) -> None:
    path = save({"a": torch.arange(6).reshape(2, 3)}, tmp_path / "x.pth")
    with path.open("rb") as stream:
        from_stream = read_tables(stream)
    assert from_stream == read_tables(path) == read_tables(io.BytesIO(path.read_bytes()))
    assert from_stream.tensors["a"] == ((2, 3), "int64", "0", 0, (3, 1))


def test_torchs_alignment_gives_the_offsets_without_local_headers(tmp_path: Path) -> None:
    from port_kit.checkpoint.byte_sources import FileSource

    path = save({f"block.{n}.weight": torch.randn(n, 7) for n in range(60)}, tmp_path / "x.pth")
    assert read_tables(path, exact_offsets=False) == read_tables(path)
    rezip(path, lambda entries: entries)
    with FileSource(path) as source:
        assert check_offsets(source, read_tables(path, exact_offsets=False).storages)


def mutate(data: bytes, source: random.Random) -> bytes:
    """Flip, cut, repeat or insert a little."""
    changed = bytearray(data)
    for _ in range(source.randint(1, 4)):
        place = source.randrange(len(changed))
        action = source.randrange(4)
        if action == 0:
            changed[place] = source.randrange(256)
        elif action == 1:
            del changed[place : place + source.randint(1, 8)]
        elif action == 2:
            changed[place:place] = changed[place : place + source.randint(1, 16)]
        else:
            changed[place:place] = source.randbytes(source.randint(1, 4))
        if not changed:
            return b"\x80"
    return bytes(changed)


@pytest.mark.parametrize("legacy", [False, True])
def test_mutated_checkpoints_end_in_an_answer_or_a_named_error(tmp_path: Path, legacy: bool) -> None:
    state = {
        "a": torch.ones(3, 2),
        "b": torch.arange(4).to(torch.uint16),
        "n": {"c": torch.nn.Parameter(torch.ones(2))},
    }
    data = save(state, tmp_path / "x.pth", legacy=legacy).read_bytes()
    source = random.Random(0)
    outcomes: dict[str, int] = {}
    for _ in range(400):
        try:
            read_tables(io.BytesIO(mutate(data, source)))
            code = "read"
        except PortKitError as error:
            code = error.code
        outcomes[code] = outcomes.get(code, 0) + 1
    assert outcomes.get("pickle_corrupt", 0) > 10, outcomes
