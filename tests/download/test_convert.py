"""Torch checkpoints to safetensors: the same tensors, flat memory, damage noticed; on disk and on the way."""

from __future__ import annotations

import argparse
import errno
import io
import json
import os
import platform
import random
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from port_kit import files
from port_kit.download import FileRule, Policy, Recipe, Repository, convert_file
from port_kit.download.progress import LineProgress
from port_kit.download.remove import remove
from port_kit.errors import CheckpointError, DownloadError
from port_kit.testing.crash_injection import ForkServer
from port_kit.testing.hub import Fault, Hub
from tests.download.helpers import MODEL_INDEX, VAE, bring, hashes, orphans
from tests.helpers import raises, wait_until

WITH_ISAL = ("x86_64", "AMD64", "aarch64", "arm64")
LEGACY = {"_use_new_zipfile_serialization": False}


def difficult() -> dict[str, torch.Tensor]:
    """Every kind of tensor that has a plain form."""
    base = torch.randn(6, 5, 4)
    parameter = torch.nn.Parameter(torch.ones(3))
    return {
        "plain": base,
        "permuted": base.permute(2, 0, 1),
        "slice": base[1:3, :, 1],
        "view": base[2],
        "expanded": torch.randn(3).expand(2, 3),
        "every other": torch.arange(9, dtype=torch.int8)[::2],
        "parameter": parameter,
        "tied": parameter,
        "scalar": torch.tensor(3),
        "empty": torch.empty(0, 4),
        "bool": torch.tensor([True, False]),
        "float8": torch.ones(3).to(torch.float8_e4m3fn),
        "float8 e5m2": torch.ones(3).to(torch.float8_e5m2),
        "uint16": torch.tensor([1, 2, 65535], dtype=torch.uint16),
        "complex": torch.randn(3, dtype=torch.complex64),
        "transposed bfloat16": torch.randn(7, 3).bfloat16().t(),
        "double": torch.randn(4, dtype=torch.float64),
        "half": torch.randn(2, 2).half(),
        "overlapping": torch.arange(8.0).as_strided((3, 4), (2, 1)),
    }


def assert_equal(path: Path, expected: dict[str, torch.Tensor]) -> None:
    """Bit for bit, with shapes and dtypes."""
    found = load_file(path)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        same = found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        left, right = found[name].reshape(-1), tensor.detach().contiguous().reshape(-1)
        assert same and torch.equal(left.view(torch.uint8), right.view(torch.uint8)), name


@pytest.mark.parametrize("options", [{}, LEGACY])
def test_every_kind_of_tensor(tmp_path: Path, options: dict[str, bool]) -> None:
    value = difficult()  # torch itself cannot load all of these from its legacy container
    torch.save(value, tmp_path / "x.pth", **options)
    done = convert_file(tmp_path / "x.pth", tmp_path / "x.safetensors")
    assert done.tensors == len(value) and done.size == (tmp_path / "x.safetensors").stat().st_size
    assert_equal(tmp_path / "x.safetensors", value)


@pytest.mark.parametrize(
    ("value", "code", "name"),
    [
        ({"a": torch.ones(2, dtype=torch.complex64).conj()}, "pickle_unsupported", "conj"),
        ({"a": torch.ones(2, dtype=torch.complex64).conj().imag}, "pickle_unsupported", "neg"),
        ({"a": torch.ones(2, 2).to_sparse()}, "pickle_unsafe", "_rebuild_sparse_tensor"),
        ({"a": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)}, "pickle_unsafe", "_rebuild_qtensor"),
        ({"a": torch.ones(2, dtype=torch.complex128)}, "pickle_unsupported", "complex128"),
        ({"a": torch.ones(2), "epoch": 3}, "pickle_unsupported", "epoch"),
        ({"epoch": 3}, "pickle_unsupported", "epoch"),
        ({}, "pickle_unsupported", "x.pth"),
        ([torch.ones(2)], "pickle_unsupported", "list"),
    ],
)
def test_a_value_without_a_safetensors_form_is_refused_by_name(
    tmp_path: Path, value: object, code: str, name: str
) -> None:
    torch.save(value, tmp_path / "x.pth")
    with raises(code, name):
        convert_file(tmp_path / "x.pth", tmp_path / "x.safetensors")
    assert list(tmp_path.iterdir()) == [tmp_path / "x.pth"]


def test_values_can_be_left_out_on_purpose(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2), "b": torch.ones(3), "epoch": 3}, tmp_path / "x.pth")
    convert_file(tmp_path / "x.pth", tmp_path / "x.safetensors", drop=["epoch", "b"])
    assert_equal(tmp_path / "x.safetensors", {"a": torch.ones(2)})


def test_a_wrapper_leaves_the_rest_behind(tmp_path: Path) -> None:
    state = {"w": torch.randn(5)}
    torch.save({"generator": state, "optimizer": {"w": torch.ones(9)}}, tmp_path / "x.pth", **LEGACY)
    convert_file(tmp_path / "x.pth", tmp_path / "x.safetensors", wrapper="generator")
    assert_equal(tmp_path / "x.safetensors", state)


def test_a_flipped_bit_is_noticed(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1000), "b": torch.randn(3)}, tmp_path / "x.pth")
    content = bytearray((tmp_path / "x.pth").read_bytes())
    content[content.index(bytes(2000)) + 1000] ^= 1
    (tmp_path / "x.pth").write_bytes(content)
    assert torch.load(tmp_path / "x.pth")["a"].any()
    with raises("pickle_corrupt", "x.pth"):
        convert_file(tmp_path / "x.pth", tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()


def test_a_flipped_bit_in_any_part_of_a_large_storage_is_noticed(tmp_path: Path) -> None:
    """A storage of many pieces."""
    torch.save({"a": torch.randn(10_000_003), "b": torch.randn(3)}, tmp_path / "x.pth")
    convert_file(tmp_path / "x.pth", tmp_path / "x.safetensors")
    assert_equal(tmp_path / "x.safetensors", torch.load(tmp_path / "x.pth"))
    for place in (5_000, 20 << 20, 39_000_000):
        with (tmp_path / "x.pth").open("r+b") as stream:
            stream.seek(place)
            byte = stream.read(1)
            stream.seek(place)
            stream.write(bytes([byte[0] ^ 4]))
            stream.flush()
            with raises("pickle_corrupt", "x.pth"):
                convert_file(tmp_path / "x.pth", tmp_path / "y.safetensors")
            stream.seek(place)
            stream.write(byte)
    assert not (tmp_path / "y.safetensors").exists()


@pytest.mark.parametrize("blocked", [False, True])
def test_checksums_are_those_of_zip_files(tmp_path: Path, blocked: bool) -> None:
    """By isal, which setup.cfg requires on these processors, and by zlib elsewhere; both detect damage."""
    torch.save({"a": torch.randn(500_000)}, tmp_path / "x.pth")
    content = bytearray((tmp_path / "x.pth").read_bytes())
    content[1_000_000] ^= 1
    (tmp_path / "damaged.pth").write_bytes(content)
    code = (
        "import pathlib, random, sys, zlib\n"
        f"if {blocked}: sys.modules['isal'] = None\n"
        "from port_kit.checkpoint.pickle_reader import crc32\n"
        "from port_kit.download import convert_file\n"
        "from port_kit.errors import CheckpointError\n"
        "source, ours, theirs = random.Random(8), 0, 0\n"
        "for length in (0, 1, 7, 64, 4095, 70_001, 1 << 20):\n"
        "    data = memoryview(source.randbytes(length + 3))[3:]\n"
        "    ours, theirs = crc32(data, ours), zlib.crc32(data, theirs)\n"
        "    assert ours == theirs\n"
        f"folder = pathlib.Path({str(tmp_path)!r})\n"
        "convert_file(folder / 'x.pth', folder / 'x.safetensors')\n"
        "try: convert_file(folder / 'damaged.pth', folder / 'y.safetensors')\n"
        "except CheckpointError as error: print(error.code, crc32 is zlib.crc32)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout == f"pickle_corrupt {blocked or platform.machine() not in WITH_ISAL}\n"
    assert_equal(tmp_path / "x.safetensors", torch.load(tmp_path / "x.pth"))


def test_a_disk_that_takes_no_such_file_is_told_before_anything_is_copied(tmp_path: Path) -> None:
    torch.save({"a": torch.randn(1_000_000)}, tmp_path / "x.pth")
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (3 << 20, 3 << 20))\n"
        "from port_kit.download import convert_file; from port_kit.errors import DownloadError\n"
        f"folder, copied = {str(tmp_path)!r}, []\n"
        "try: convert_file(folder + '/x.pth', folder + '/x.safetensors', advance=copied.append)\n"
        "except DownloadError as error: print(error.code, copied)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout == "file_too_large []\n", done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["x.pth"]


@pytest.mark.parametrize("answer", [errno.EOPNOTSUPP, errno.ENOSYS, None], ids=["file system", "kernel", "system"])
def test_without_allocation_files_still_get_their_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: int | None
) -> None:
    call = None if answer is None else lambda *_: answer
    monkeypatch.setattr(files, "_system_call", lambda _name: call)
    with (tmp_path / "file").open("wb") as stream:
        files.allocate(stream.fileno(), 3 << 20)
        assert os.fstat(stream.fileno()).st_size == 3 << 20


def test_a_file_system_that_allocates_nothing_still_gives_files_their_size(tmp_path: Path) -> None:
    code = (
        "import os, sys; from port_kit.files import allocate\n"
        "with open(sys.argv[1], 'wb') as stream:\n"
        "    allocate(stream.fileno(), 3 << 20)\n"
        "    print(os.fstat(stream.fileno()).st_size)"
    )
    # without permission to mount, test the existing file system
    script = 'mount -t ramfs ramfs "$0"; exec "$1" -c "$2" "$0/file"'
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", script, str(tmp_path), sys.executable, code]
    if subprocess.run([*command[:3], "true"], capture_output=True, check=False, timeout=300).returncode:
        command = command[3:]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout == f"{3 << 20}\n", done.stderr


def test_unchanged_sources_cost_nothing_and_changed_ones_are_noticed(tmp_path: Path) -> None:
    source, target = tmp_path / "x.pth", tmp_path / "x.safetensors"
    torch.save({"a": torch.zeros(1000)}, source)
    assert not convert_file(source, target).unchanged
    before = target.stat()
    assert convert_file(source, target).unchanged and target.stat() == before
    torch.save({"a": torch.ones(1000)}, source)
    assert not convert_file(source, target).unchanged
    assert_equal(target, {"a": torch.ones(1000)})
    target.write_bytes(target.read_bytes()[:-1])
    assert not convert_file(source, target).unchanged


def test_places_that_cannot_be_used(tmp_path: Path) -> None:
    with raises("source_missing", "none.pth"):
        convert_file(tmp_path / "none.pth", tmp_path / "x.safetensors")
    torch.save({"a": torch.ones(1)}, tmp_path / "x.pth")
    with raises("output_dir", "x.pth"):
        convert_file(tmp_path / "x.pth", tmp_path / "x.pth")


def big_checkpoint(path: Path, megabytes: int) -> Path:
    """A checkpoint of several tensors, saved without holding it twice."""
    tensors = {f"layer.{n}.weight": torch.randn(1024, 1024) for n in range(megabytes // 4)}
    torch.save(tensors, path)
    return path


def run_limited(code: str, data_limit: int) -> subprocess.CompletedProcess[str]:
    """Run Python under ``ulimit -d``; the last word of stdout is the peak of resident memory in kB."""
    peak = "\nprint(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1])"

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (data_limit, data_limit))

    command = [sys.executable, "-c", code + peak]
    return subprocess.run(command, capture_output=True, text=True, preexec_fn=limit, check=False, timeout=300)


def check_memory(tmp_path: Path, megabytes: int) -> None:
    """Assert that the conversion needs less memory than torch."""
    source, target = big_checkpoint(tmp_path / "x.pth", megabytes), tmp_path / "x.safetensors"
    limit = 100 << 20
    code = f"from port_kit.download import convert_file\nconvert_file({str(source)!r}, {str(target)!r})"
    done = run_limited(code, limit)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) < 64 << 10
    assert_equal(target, torch.load(source, mmap=True))


def test_memory_stays_flat(tmp_path: Path) -> None:
    check_memory(tmp_path, 256)


@pytest.mark.slow
def test_memory_stays_flat_at_two_gigabytes(tmp_path: Path) -> None:
    check_memory(tmp_path, 2048)


def test_killed_while_converting_leaves_no_file(tmp_path: Path) -> None:
    source, target = big_checkpoint(tmp_path / "x.pth", 128), tmp_path / "x.safetensors"
    code = f"from port_kit.download import convert_file\nconvert_file({str(source)!r}, {str(target)!r})"
    process = subprocess.Popen([sys.executable, "-c", code])
    wait_until(lambda: list(tmp_path.glob(".x.safetensors.*.tmp")), pause=0.001)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=60)
    assert not target.exists()
    convert_file(source, target)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.pth", "x.safetensors"]
    assert_equal(target, torch.load(source, mmap=True))


# --- on the way from the Hub ---------------------------------------------------------------------------------------


def on_the_way(wrapper: str = "") -> Recipe:
    """A recipe of one checkpoint that is converted."""
    rule = FileRule("x.pth", "vae", "model.safetensors", convert=True, wrapper=wrapper)
    return Recipe("r", (Repository(VAE, (rule,)),), MODEL_INDEX)


SMALL = Policy(segment_size=30_000, read_timeout=0.6, attempts=4, base=0.02, longest=5)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Difficult tensors under a key, with some bulk and an optimizer beside them."""
    bulk = {f"bulk.{n}": torch.randn(50, 100) for n in range(20)}
    value = {"generator": {**difficult(), **bulk}, "optimizer": {"m": torch.randn(10_000)}}
    torch.save(value, tmp_path / "x.pth")
    return tmp_path / "x.pth"


@pytest.fixture
def vae_hub(checkpoint: Path) -> Iterator[Hub]:
    """A Hub with the checkpoint."""
    with Hub({VAE: {"x.pth": checkpoint}}) as hub:
        yield hub


def assert_converted(directory: Path, checkpoint: Path) -> None:
    """The safetensors file is right, and the checkpoint itself never became a file."""
    assert_equal(directory / "vae/model.safetensors", torch.load(checkpoint)["generator"])
    assert not list(directory.rglob("*.pth")) and orphans(directory) == []


def test_a_remote_checkpoint_becomes_safetensors_on_the_way(vae_hub: Hub, checkpoint: Path, tmp_path: Path) -> None:
    report = bring(on_the_way("generator"), tmp_path / "m", vae_hub, policy=SMALL)
    assert_converted(tmp_path / "m", checkpoint)
    assert report.network_bytes == checkpoint.stat().st_size
    assert bring(on_the_way("generator"), tmp_path / "m", vae_hub, verify=True).repaired == {}


@pytest.mark.parametrize(
    "fault",
    [
        Fault("get", cut=10_000, times=8, skip=6),
        Fault("get", flip=500_000),
        Fault("get", flip=300_000, skip=8),
        Fault("get", ignore_range=True, skip=5),
        Fault("get", status=503, times=2, skip=3),
    ],
)
def test_faults_on_the_way(vae_hub: Hub, checkpoint: Path, tmp_path: Path, fault: Fault) -> None:
    vae_hub.inject(fault)
    bring(on_the_way("generator"), tmp_path / "m", vae_hub, policy=SMALL)
    assert_converted(tmp_path / "m", checkpoint)


def test_original_kept_gives_the_same_file(vae_hub: Hub, checkpoint: Path, tmp_path: Path) -> None:
    bring(on_the_way("generator"), tmp_path / "m", vae_hub)
    vae_hub.requests.clear()
    report = bring(on_the_way("generator"), tmp_path / "n", vae_hub, keep_original=True)
    assert sum(request.sent for request in vae_hub.gets()) == checkpoint.stat().st_size
    assert report.local_bytes == checkpoint.stat().st_size
    assert (tmp_path / f"n/original/{VAE}/x.pth").read_bytes() == checkpoint.read_bytes()
    name = "vae/model.safetensors"
    assert hashes(tmp_path / "n")[name] == hashes(tmp_path / "m")[name]


def test_a_legacy_checkpoint_on_the_way(tmp_path: Path) -> None:
    value = difficult()
    torch.save({"generator": value, "rest": {"x": torch.ones(99)}}, tmp_path / "x.pth", **LEGACY)
    with Hub({VAE: {"x.pth": tmp_path / "x.pth"}}) as hub:
        bring(on_the_way("generator"), tmp_path / "m", hub)
    assert_equal(tmp_path / "m/vae/model.safetensors", value)


def test_an_evil_checkpoint_is_refused_before_it_is_fetched(tmp_path: Path) -> None:
    from tests.checkpoint.test_pickle_reader import Call

    marker = tmp_path / "marker"
    torch.save({"a": torch.randn(500_000), "b": Call(os.system, f"touch {marker}")}, tmp_path / "x.pth")
    with Hub({VAE: {"x.pth": tmp_path / "x.pth"}}) as hub:
        with raises("pickle_unsafe", "system"):
            bring(on_the_way(), tmp_path / "m", hub)
        assert sum(request.sent for request in hub.gets()) < 500_000
    assert not marker.exists() and not (tmp_path / "m/model_index.json").exists()


@pytest.mark.parametrize("alignment", [0, 4096, 128])
def test_an_archive_of_another_alignment_is_converted_on_the_way(tmp_path: Path, alignment: int) -> None:
    from torch.utils.serialization import config

    from tests.checkpoint.test_pickle_reader import rezip

    with config.patch("save.storage_alignment", alignment or 64):
        torch.save({"generator": {f"t{n}": torch.randn(n + 1) for n in range(9)}}, tmp_path / "x.pth")
    if not alignment:
        rezip(tmp_path / "x.pth", lambda entries: entries)
    with Hub({VAE: {"x.pth": tmp_path / "x.pth"}}) as hub:
        bring(on_the_way("generator"), tmp_path / "m", hub)
        hub.inject(Fault("get", times=-1, ignore_range=True))
        with pytest.raises(DownloadError) as caught:
            bring(on_the_way("generator"), tmp_path / "n", hub)
        assert caught.value.code == "convert_layout" and "--keep-original" in caught.value.hint
        bring(on_the_way("generator"), tmp_path / "n", hub, keep_original=True)
    for name in ("m", "n"):
        found = tmp_path / name / "vae/model.safetensors"
        assert_equal(found, torch.load(tmp_path / "x.pth")["generator"])


def test_ranges_that_are_cut_short_are_asked_for_again(tmp_path: Path) -> None:
    """HTTP allows a server to send less than it was asked for."""
    torch.save({f"t{n}": torch.randn(50, 50) for n in range(9)}, tmp_path / "x.pth")
    recipe = Recipe(
        "r", (Repository(VAE, (FileRule("x.pth", "vae", "model.safetensors", convert=True),)),), MODEL_INDEX
    )
    with Hub({VAE: {"x.pth": tmp_path / "x.pth"}}, longest_range=5000) as hub:
        bring(recipe, tmp_path / "m", hub)
        assert max(request.sent for request in hub.gets() if "Range" in request.headers) == 5000
    assert_equal(tmp_path / "m/vae/model.safetensors", torch.load(tmp_path / "x.pth"))


@pytest.mark.parametrize("on_the_hub", [False, True])
def test_a_recipe_leaves_out_what_is_no_tensor(tmp_path: Path, on_the_hub: bool) -> None:
    """Numbers beside the tensors are reported; other values need the recipe's word."""
    value = {"w": torch.ones(2), "head": torch.ones(3), "epoch": 3, "args": argparse.Namespace(a=1), "names": {"x"}}
    torch.save(value, tmp_path / "x.pth")
    said = io.StringIO()
    with Hub({VAE: {"x.pth": tmp_path / "x.pth"}}) as hub:

        def run(*drop: str) -> Path:
            rule = FileRule("x.pth", convert=True, drop=drop)
            recipe = Recipe("r", (Repository(VAE, (rule,)),), MODEL_INDEX)
            options = {"keep_original": not on_the_hub, "progress": LineProgress(said)}
            bring(recipe, tmp_path / "-".join(["m", *drop]), hub, **options)
            return tmp_path / "-".join(["m", *drop]) / "x.safetensors"

        assert_equal(run("args", "names", "head"), {"w": torch.ones(2)})
        assert "epoch (int)" in said.getvalue() or not on_the_hub
        assert_equal(run("args", "names"), {"w": torch.ones(2), "head": torch.ones(3)})
        for drop, code in (((), "pickle_unsafe"), (("args",), "pickle_unsupported"), (("arks",), "pickle_drop")):
            with pytest.raises(CheckpointError) as caught:
                run(*drop)
            assert caught.value.code == code
    plain, dropping = (Recipe("r", (Repository(VAE, (rule,)),), MODEL_INDEX) for rule in RULES)
    assert plain.fingerprint() != dropping.fingerprint()


RULES = (FileRule("x.pth", convert=True), FileRule("x.pth", convert=True, drop=("a",)))


def test_the_index_of_converted_shards_is_rewritten(tmp_path: Path) -> None:
    names = [f"pytorch_model-0000{number}-of-00002.bin" for number in (1, 2)]
    for number, name in enumerate(names):
        torch.save({f"w{number}": torch.ones(2)}, tmp_path / name)
    index = {"metadata": {"total_size": 16}, "weight_map": {f"w{number}": name for number, name in enumerate(names)}}
    files = {f"t/{name}": tmp_path / name for name in names}
    rules = (FileRule("t/*.bin", "t", convert=True), FileRule("t/*.json", "t"))
    recipe = Recipe("r", (Repository(VAE, rules),), MODEL_INDEX)
    with Hub({VAE: {**files, "t/pytorch_model.bin.index.json": json.dumps(index).encode()}}) as hub:
        bring(recipe, tmp_path / "m", hub)
        written = json.loads((tmp_path / "m/t/pytorch_model.safetensors.index.json").read_text())
        assert written["weight_map"] == {
            f"w{number}": name.replace(".bin", ".safetensors") for number, name in enumerate(names)
        }
        report = bring(recipe, tmp_path / "m", hub, verify=True)
        assert report.untracked_files == () and report.repaired == {}
        assert remove(tmp_path / "m").gone


def test_killed_at_random_steps_on_the_way(vae_hub: Hub, checkpoint: Path, tmp_path: Path) -> None:
    source = random.Random(3)
    with ForkServer() as fork_server:
        for trial in range(6):
            directory = tmp_path / f"m{trial}"
            step = source.randrange(10, 150)
            options = {"endpoint": vae_hub.endpoint, "token": False}
            fork_server.start(on_the_way("generator"), directory, kill_at=step, policy=SMALL, **options).wait()
            bring(on_the_way("generator"), directory, vae_hub, policy=SMALL)
            assert_converted(directory, checkpoint)
