"""Model directories that are read-only, damaged, in use or owned by another user: they work, or raise one error."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from port_kit.download import FileRule, Policy, Recipe, Report, Repository
from port_kit.download.remove import remove
from port_kit.errors import DownloadError
from port_kit.testing.hub import Fault, Hub
from tests.download.helpers import (
    MODEL_INDEX,
    WEIGHTS,
    assert_whole,
    bring,
    hashes,
    noise,
    orphans,
    without_privileges,
)
from tests.helpers import raises, wait_until

BIG = "transformer/big.safetensors"
RUN = """
import sys
from port_kit.download import Recipe, download
from port_kit.errors import PortKitError
recipe, directory, endpoint, options = Recipe.from_dict(eval(sys.argv[1])), *sys.argv[2:4], eval(sys.argv[4])
try:
    report = download(recipe, directory, endpoint=endpoint, token=False, use_cache=False, **options)
    print("complete", list(report.fetched))
except PortKitError as error:
    print(error.code, error.message)
"""


def unprivileged(recipe: Recipe, directory: Path, hub: Hub, **options: bool) -> str:
    """Run a download that respects file permissions, even if the tests run as root; return its output."""
    arguments = [repr(dataclasses.asdict(recipe)), str(directory), hub.endpoint, repr(options)]
    done = subprocess.run(
        [sys.executable, "-c", RUN, *arguments],
        preexec_fn=without_privileges,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def lock_up(directory: Path, mode: int) -> None:
    """Remove write permission from a directory tree, or restore it."""
    for path in (directory, *directory.rglob("*")):
        path.chmod(mode | 0o111 if path.is_dir() else mode)


def test_a_whole_read_only_directory_is_used_and_a_damaged_one_named(hub: Hub, recipe: Recipe, tmp_path: Path) -> None:
    bring(recipe, tmp_path / "m", hub)
    hub.requests.clear()
    lock_up(tmp_path / "m", 0o444)
    try:
        for options in ({}, {"offline": True}, {"verify": True}, {"verify": True, "offline": True}):
            assert unprivileged(recipe, tmp_path / "m", hub, **options) == "complete []"
        (tmp_path / "m/vae/vae.safetensors").chmod(0)
        said = unprivileged(recipe, tmp_path / "m", hub, verify=True)
        assert said.startswith("output_dir") and "vae/vae.safetensors: cannot be read" in said
        (tmp_path / "m/port.lock").chmod(0)
        assert unprivileged(recipe, tmp_path / "m", hub).startswith("output_dir")
        said = unprivileged(recipe.with_(configs={"vae": {"n": 1}}), tmp_path / "m", hub)
        assert said.startswith("output_dir") and hub.requests == []
    finally:
        lock_up(tmp_path / "m", 0o644)
    assert_whole(tmp_path / "m")


def test_a_read_only_place_is_named_before_anything_is_asked(hub: Hub, recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "ro").mkdir(mode=0o555)
    assert unprivileged(recipe, tmp_path / "ro/m", hub).startswith("output_dir")
    assert hub.requests == []


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (lambda m: m.symlink_to("nowhere"), "output_dir"),
        (lambda m: m.symlink_to("m"), "output_dir"),
        (lambda m: (m.mkdir(), (m / ".port_kit").write_text("x")), "output_dir"),
        (lambda m: (m / BIG).mkdir(parents=True), "target_foreign"),
        (lambda m: (m / "model_index.json").mkdir(parents=True), "target_foreign"),
        (lambda m: (m / "port.lock").mkdir(parents=True), "lock_invalid"),
        (lambda m: (m.mkdir(), (m / "transformer").write_text("x")), "target_foreign"),
        (
            lambda m: (m / "vae").mkdir(parents=True) or (m / "vae/vae.safetensors").symlink_to("/etc/passwd"),
            "target_foreign",
        ),
    ],
)
def test_what_is_in_the_way_is_named(
    hub: Hub, recipe: Recipe, tmp_path: Path, make: Callable[[Path], object], code: str
) -> None:
    make(tmp_path / "m")
    with pytest.raises(DownloadError) as caught:
        bring(recipe, tmp_path / "m", hub)
    assert caught.value.code == code and hub.gets() == []


@pytest.mark.parametrize("name", ["x" * 300, "d/" * 1500, "a.pth/below"])
def test_places_that_cannot_be_made(hub: Hub, recipe: Recipe, tmp_path: Path, name: str) -> None:
    (tmp_path / "a.pth").write_text("a file")
    with pytest.raises(DownloadError) as caught:
        bring(recipe, tmp_path / name, hub)
    assert caught.value.code == "output_dir" and hub.requests == []


@pytest.mark.parametrize("name", ["'quote\"", "-dash", "new\nline", "trailing ", "%s{}$HOME*[a]", "日本"])
def test_names_with_all_kinds_of_characters(hub: Hub, recipe: Recipe, tmp_path: Path, name: str) -> None:
    bring(recipe, tmp_path / name, hub)
    assert_whole(tmp_path / name)
    assert remove(tmp_path / name).gone


def test_prune_leaves_a_component_behind_a_link_alone(hub: Hub, recipe: Recipe, tmp_path: Path) -> None:
    """Weights on another disk, or in a folder beside."""
    (tmp_path / "m/inside").mkdir(parents=True)
    (tmp_path / "disk").mkdir()
    (tmp_path / "m/transformer").symlink_to(tmp_path / "disk")
    (tmp_path / "m/vae").symlink_to("inside")
    bring(recipe, tmp_path / "m", hub)
    (tmp_path / "m/mine.txt").write_text("x")
    assert bring(recipe, tmp_path / "m", hub, prune=True).removed == ("mine.txt",)
    assert_whole(tmp_path / "m")
    assert bring(recipe, tmp_path / "m", hub, verify=True).repaired == {}


@pytest.mark.parametrize("target", ["../victim", "/victim", "a/../../victim"])
@pytest.mark.parametrize("part", ["files", "written"])
def test_a_lock_that_names_other_peoples_files_deletes_nothing(
    hub: Hub, recipe: Recipe, tmp_path: Path, target: str, part: str
) -> None:
    bring(recipe, tmp_path / "m", hub)
    (tmp_path / "victim").write_text("precious")
    lock = json.loads((tmp_path / "m/port.lock").read_text())
    place = target.replace("/victim", f"{tmp_path}/victim") if target.startswith("/") else target
    lock[part][place] = lock["files"][BIG] if part == "files" else {"size": 8, "sha256": "0" * 64}
    (tmp_path / "m/port.lock").write_text(json.dumps(lock))
    for action in (lambda: remove(tmp_path / "m"), lambda: bring(recipe, tmp_path / "m", hub, verify=True)):
        with pytest.raises(DownloadError) as caught:
            action()
        assert caught.value.code == "path_unsafe"
    assert (tmp_path / "victim").read_text() == "precious" and (tmp_path / "m" / BIG).is_file()


@pytest.mark.parametrize(
    "change",
    [
        lambda lock: [],
        lambda lock: 5,
        lambda lock: {**lock, "schema": "port-kit-lock/2"},
        lambda lock: {**lock, "files": 5},
        lambda lock: {**lock, "revisions": 5},
        lambda lock: {**lock, "revisions": {WEIGHTS: 5}},
        lambda lock: {**lock, "written": {"a": 5}},
        lambda lock: {**lock, "code": {"a": 5}},
        lambda lock: {**lock, "complete": "yes"},
        lambda lock: {**lock, "files": {"a": {**lock["files"][BIG], "size": "5"}}},
        lambda lock: {**lock, "files": {"a": {**lock["files"][BIG], "final_size": None}}},
        lambda lock: {**lock, "surprise": 1},
        lambda lock: {key: value for key, value in lock.items() if key != "written"},
    ],
)
def test_a_lock_that_was_not_written_like_that_is_named(
    hub: Hub, recipe: Recipe, tmp_path: Path, change: Callable[[dict[str, object]], object]
) -> None:
    bring(recipe, tmp_path / "m", hub)
    place = tmp_path / "m/port.lock"
    place.write_text(json.dumps(change(json.loads(place.read_text()))))
    for action in (lambda: remove(tmp_path / "m"), lambda: bring(recipe, tmp_path / "m", hub)):
        with pytest.raises(DownloadError) as caught:
            action()
        assert caught.value.code == "lock_invalid"


@pytest.mark.parametrize("content", ["[" * 100_000, "{", "\x00"])
def test_a_lock_that_is_no_json_is_named(hub: Hub, recipe: Recipe, tmp_path: Path, content: str) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m/port.lock").write_text(content)
    with pytest.raises(DownloadError) as caught:
        bring(recipe, tmp_path / "m", hub)
    assert caught.value.code == "lock_invalid"


@pytest.mark.parametrize("line", ["5", "[]", "[1]", '["a","b","c"]', '["../x",1,"0"]', "\x00", "[" * 100_000])
def test_a_journal_with_strange_lines_is_read_past_them(hub: Hub, recipe: Recipe, tmp_path: Path, line: str) -> None:
    hub.inject(Fault("get", "big.safetensors", times=-1, status=403))
    with pytest.raises(DownloadError):
        bring(recipe, tmp_path / "m", hub)
    hub.faults.clear()
    with (tmp_path / "m/.port_kit/journal").open("a") as stream:
        stream.write(f"\n{line}\n")
    bring(recipe, tmp_path / "m", hub)
    assert_whole(tmp_path / "m")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda part: (part / "meta.json").write_text("5"),
        lambda part: (part / "meta.json").write_text("x"),
        lambda part: (part / "meta.json").write_text((part / "meta.json").read_text().replace("1048576", "-1")),
        lambda part: (part / "progress").write_bytes(b"\xff" * 13),
        lambda part: (part / "progress").unlink(),
        lambda part: (part / "data").write_bytes(b"other bytes"),
        lambda part: (part / "data").unlink(),
    ],
)
def test_a_part_that_was_spoilt_costs_bytes_but_spoils_nothing(
    hub: Hub, recipe: Recipe, tmp_path: Path, spoil: Callable[[Path], object]
) -> None:
    one = Policy(connections=1, segment_size=1 << 20, base=0.02)
    hub.inject(Fault("get", "big.safetensors", skip=2, times=-1, status=403))
    with pytest.raises(DownloadError):
        bring(recipe, tmp_path / "m", hub, policy=one)
    hub.faults.clear()
    parts = [path for path in (tmp_path / "m").glob(".port_kit/parts/*") if "spec" in (path / "meta.json").read_text()]
    assert parts
    for part in parts:
        spoil(part)
    bring(recipe, tmp_path / "m", hub, policy=one)
    assert_whole(tmp_path / "m")


def test_another_port_in_the_directory_is_not_replaced(hub: Hub, recipe: Recipe, tmp_path: Path) -> None:
    bring(recipe, tmp_path / "m", hub)
    before = hashes(tmp_path / "m")
    other = Recipe("other", recipe.repositories[1:2], MODEL_INDEX)
    for options in ({}, {"dry_run": True}, {"offline": True}, {"update": True}):
        with raises("target_foreign", "small", "other") as caught:
            bring(other, tmp_path / "m", hub, **options)
        assert "port-kit remove" in caught.value.hint
    assert hashes(tmp_path / "m") == before


def test_a_dry_run_verifies_and_repairs_nothing(hub: Hub, recipe: Recipe, tmp_path: Path) -> None:
    bring(recipe, tmp_path / "m", hub)
    assert bring(recipe, tmp_path / "m", hub, dry_run=True, offline=True).complete
    place = tmp_path / "m/vae/vae.safetensors"
    place.write_bytes(bytes(place.stat().st_size))
    plan = bring(recipe, tmp_path / "m", hub, dry_run=True, verify=True).plan
    assert plan is not None and [identity.target for identity in plan.fetch] == ["vae/vae.safetensors"]
    assert "vae/vae.safetensors: sha256" in plan.describe() and place.read_bytes() == bytes(300_000)
    with pytest.raises(DownloadError) as caught:
        bring(recipe, tmp_path / "m", hub, update=True, offline=True)
    assert caught.value.code == "offline_incomplete"


def test_a_removal_waits_for_a_download_and_takes_what_it_brought(tmp_path: Path) -> None:
    """And a download that waits for the removal begins anew, under a lock of its own."""
    recipe = Recipe("r", (Repository(WEIGHTS, (FileRule("f"),)),), MODEL_INDEX)
    with Hub({WEIGHTS: {"f": noise(1 << 20)}}) as hub, ThreadPoolExecutor() as pool:

        def slow_download() -> Future[Report]:
            hub.inject(Fault("get", stall=2))
            count = len(hub.gets())
            started = pool.submit(bring, recipe, tmp_path / "m", hub, policy=Policy())
            wait_until(lambda: len(hub.gets()) > count)
            return started

        waited: list[str] = []
        first = slow_download()
        done = remove(tmp_path / "m", waited.append)
        assert first.result(timeout=60).complete and done.gone and done.left == ()
        assert set(done.removed) == {"f", "model_index.json", "port.lock"}
        assert len(waited) == 1 and "waiting for another download" in waited[0]
        runs = [slow_download(), pool.submit(remove, tmp_path / "m"), pool.submit(bring, recipe, tmp_path / "m", hub)]
        assert [bool(run.result(timeout=60)) for run in runs] == [True] * 3
        assert bring(recipe, tmp_path / "m", hub).complete and orphans(tmp_path / "m") == []


def test_four_repositories_as_planned(tmp_path: Path) -> None:
    """The bytes, files and requests of a fresh run equal those of the plan."""
    contents = {
        f"org/{letter}": {f"{letter}.safetensors": noise(300_000 + index, index)} for index, letter in enumerate("abcd")
    }
    with Hub(contents) as hub:
        rules = {repo: (FileRule("*.safetensors", repo[-1]),) for repo in contents}
        recipe = Recipe(
            "four", tuple(Repository(repo, rules[repo], hub.commit(repo)) for repo in contents), MODEL_INDEX
        )
        plan = bring(recipe, tmp_path / "m", hub, dry_run=True).plan
        assert plan is not None
        hub.requests.clear()
        report = bring(recipe, tmp_path / "m", hub)
        kinds = [request.kind for request in hub.requests]
        assert {kind: kinds.count(kind) for kind in kinds} == {"tree": 4, "head": 4, "get": 4}
        assert report.network_bytes == plan.bytes_to_fetch == sum(request.sent for request in hub.gets())
        assert set(report.fetched) == {identity.target for identity in plan.fetch}
        assert_whole(
            tmp_path / "m",
            {f"{repo[-1]}/{name}": data for repo, files in contents.items() for name, data in files.items()},
        )


@pytest.mark.slow
def test_a_small_disk_of_its_own(tmp_path: Path) -> None:
    """Needs the right to mount: a tmpfs that cannot hold the model, and one that fills up in mid-flight."""
    disk = tmp_path / "disk"
    disk.mkdir()
    recipe = Recipe("r", (Repository(WEIGHTS, (FileRule("f"),)),), MODEL_INDEX)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)], check=True, timeout=300)
    try:
        with Hub({WEIGHTS: {"f": noise(9 << 20)}}) as hub:
            with pytest.raises(DownloadError) as caught:
                bring(recipe, disk / "m", hub)
            assert caught.value.code == "disk_full" and hub.gets() == []
        with Hub({WEIGHTS: {"f": noise(6 << 20)}}, bytes_per_second=3 << 20) as hub:
            shutil.rmtree(disk / "m", ignore_errors=True)

            def fill() -> None:
                wait_until(lambda: sum(request.sent for request in hub.gets()) >= 2 << 20, pause=0.005)
                with (disk / "ballast").open("wb") as stream:
                    os.posix_fallocate(stream.fileno(), 0, shutil.disk_usage(disk).free - (1 << 20))

            filling = threading.Thread(target=fill)
            filling.start()
            with pytest.raises(DownloadError) as caught:
                bring(recipe, disk / "m", hub, policy=Policy(connections=1))
            filling.join(60)
            assert not filling.is_alive()
            assert caught.value.code == "disk_full" and not (disk / "m/model_index.json").exists()
            (disk / "ballast").unlink()
            hub.requests.clear()
            bring(recipe, disk / "m", hub, policy=Policy(connections=1))
            assert (disk / "m/f").read_bytes() == noise(6 << 20) and sum(
                request.sent for request in hub.gets()
            ) < 5 << 20
    finally:
        subprocess.run(["umount", str(disk)], check=True, timeout=300)
