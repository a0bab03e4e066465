"""Files around a model directory, behind its links, or in it before the download do not change."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from port_kit.download import FileRule, Policy, Recipe, Repository
from port_kit.download.lock import append_journal
from port_kit.download.parts import FileSpec, acquire
from port_kit.download.remove import remove
from port_kit.download.state import directory_lock
from port_kit.errors import DownloadError
from port_kit.owner import owner
from port_kit.testing.hub import Fault, Hub
from tests.download.helpers import MODEL_INDEX, VAE, WEIGHTS, bring, noise, orphans, without_privileges

CONTENT = noise(200_000, 5)
TARGET = "vae/f.safetensors"
RECIPE = Recipe("r", (Repository(WEIGHTS, (FileRule("f.safetensors", "vae"),)),), MODEL_INDEX)
PRECIOUS = b"precious"


@pytest.fixture
def hub() -> Iterator[Hub]:
    """A Hub with one file."""
    with Hub({WEIGHTS: {"f.safetensors": CONTENT}}) as running:
        yield running


def spec_of(hub: Hub) -> FileSpec:
    """Return the specification of the recipe's file."""
    digest = f"sha256:{hashlib.sha256(CONTENT).hexdigest()}"
    return FileSpec(TARGET, WEIGHTS, hub.commit(WEIGHTS), "f.safetensors", len(CONTENT), digest)


def abandoned(directory: Path, hub: Hub) -> Path:
    """A partial download of a process that has ended."""
    partial = acquire(directory, spec_of(hub), 1 << 20, exclusive=True)
    partial.close()
    return partial.folder.rename(partial.folder.with_name(f"{partial.folder.name.rpartition('~')[0]}~1"))


def replace(link: Path, victim: Path, how: str) -> None:
    """Put a link to the victim in a file's place."""
    link.parent.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(victim) if how == "symbolic" else link.hardlink_to(victim)


@pytest.mark.parametrize("how", ["symbolic", "hard"])
@pytest.mark.parametrize("name", ["lock", "journal", "data", "progress", "meta.json"])
def test_links_in_the_state_folder_are_not_followed(hub: Hub, tmp_path: Path, name: str, how: str) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(PRECIOUS)
    part = name in ("data", "progress", "meta.json")
    folder = abandoned(tmp_path / "m", hub) if part else tmp_path / "m/.port_kit"
    replace(folder / name, victim, how)
    try:
        bring(RECIPE, tmp_path / "m", hub)
        assert (tmp_path / "m" / TARGET).read_bytes() == CONTENT
    except DownloadError as error:
        assert error.code == "output_dir" and name in ("lock", "journal")
    assert victim.read_bytes() == PRECIOUS


@pytest.mark.parametrize("name", [".port_kit", ".port_kit/parts"])
def test_folders_of_the_state_that_are_links_are_refused(hub: Hub, tmp_path: Path, name: str) -> None:
    (tmp_path / "disk/thesis").mkdir(parents=True)
    (tmp_path / "disk/thesis/chapter.txt").write_bytes(PRECIOUS)
    (tmp_path / "m" / name).parent.mkdir(parents=True)
    (tmp_path / "m" / name).symlink_to(tmp_path / "disk")
    with pytest.raises(DownloadError) as caught:
        bring(RECIPE, tmp_path / "m", hub)
    assert caught.value.code == "output_dir" and hub.gets() == []
    assert [path.name for path in (tmp_path / "disk").rglob("*")] == ["thesis", "chapter.txt"]


def test_only_partial_downloads_are_deleted_in_the_state_folder(hub: Hub, tmp_path: Path) -> None:
    parts = tmp_path / "m/.port_kit/parts"
    (parts / "notes").mkdir(parents=True)
    (parts / f"{'0' * 16}.gone~1~1x").mkdir()
    (tmp_path / "m/.port_kit/mine.txt").write_text("x")
    linked = abandoned(tmp_path / "m", hub)
    (linked / "shared").symlink_to(tmp_path)
    bring(RECIPE, tmp_path / "m", hub)
    assert sorted(path.name for path in parts.iterdir()) == [f"{'0' * 16}.gone~1~1x", "notes"]
    assert remove(tmp_path / "m").left == (".port_kit/mine.txt",)
    assert tmp_path.is_dir() and not linked.exists()


@pytest.mark.parametrize("linked", [False, True])
def test_an_adopted_file_is_never_deleted(hub: Hub, tmp_path: Path, linked: bool) -> None:
    shared = tmp_path / "shared" if linked else tmp_path / "m/vae"
    shared.mkdir(parents=True)
    (shared / "f.safetensors").write_bytes(CONTENT)
    if linked:
        (tmp_path / "m").mkdir()
        (tmp_path / "m/vae").symlink_to(shared)
    assert bring(RECIPE, tmp_path / "m", hub).network_bytes == 0
    assert json.loads((tmp_path / "m/port.lock").read_text())["files"][TARGET]["adopted"]
    other = Recipe("r", (Repository(WEIGHTS, (FileRule("f.safetensors", "other"),)),), MODEL_INDEX)
    assert TARGET not in bring(other, tmp_path / "m", hub).removed  # another recipe does not need it
    bring(RECIPE, tmp_path / "m", hub)
    (shared / "f.safetensors").write_bytes(bytes(len(CONTENT)))
    with pytest.raises(DownloadError) as caught:
        bring(RECIPE, tmp_path / "m", hub, verify=True)
    assert caught.value.code == "target_foreign"
    hub.push(WEIGHTS, {"f.safetensors": noise(1000)})
    with pytest.raises(DownloadError) as caught:
        bring(RECIPE, tmp_path / "m", hub, update=True)
    assert caught.value.code == "target_foreign"
    assert (shared / "f.safetensors").read_bytes() == bytes(len(CONTENT))
    left = remove(tmp_path / "m")
    assert (shared / "f.safetensors").exists() and ("vae" if linked else TARGET) in left.left


def test_what_was_downloaded_behind_a_linked_folder_is_not_deleted_either(hub: Hub, tmp_path: Path) -> None:
    """A lock of another user could name any file."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "m").mkdir()
    (tmp_path / "m/vae").symlink_to(tmp_path / "disk")
    bring(RECIPE, tmp_path / "m", hub)
    hub.push(WEIGHTS, {"f.safetensors": noise(1000)})
    with pytest.raises(DownloadError) as caught:
        bring(RECIPE, tmp_path / "m", hub, update=True)
    assert caught.value.code == "target_foreign"
    remove(tmp_path / "m")
    assert (tmp_path / "disk/f.safetensors").read_bytes() == CONTENT


def test_a_configuration_that_was_there_is_kept(hub: Hub, tmp_path: Path) -> None:
    recipe = RECIPE.with_(configs={"vae": {"n": 1}})
    (tmp_path / "m/vae").mkdir(parents=True)
    (tmp_path / "m/vae/config.json").write_text('{\n  "n": 1\n}\n')
    bring(recipe, tmp_path / "m", hub)
    with pytest.raises(DownloadError) as caught:
        bring(recipe.with_(configs={"vae": {"n": 2}}), tmp_path / "m", hub)
    assert caught.value.code == "target_foreign"
    assert remove(tmp_path / "m").left == ("vae/config.json",)


def test_a_new_configuration_does_not_replace_a_file_of_the_users(hub: Hub, tmp_path: Path) -> None:
    bring(RECIPE, tmp_path / "m", hub)
    (tmp_path / "m/vae/config.json").write_text("{}")
    with pytest.raises(DownloadError) as caught:
        bring(RECIPE.with_(configs={"vae": {"n": 1}}), tmp_path / "m", hub)
    assert caught.value.code == "target_foreign" and (tmp_path / "m/vae/config.json").read_text() == "{}"


def test_prune_needs_a_directory_that_was_one_before(hub: Hub, tmp_path: Path) -> None:
    bring(RECIPE, tmp_path / "new", hub, prune=True)  # an empty directory contains no file to lose
    subprocess.run(["git", "init", "--quiet", str(tmp_path / "m")], check=True, timeout=300)
    (tmp_path / "m/paper.tex").write_bytes(PRECIOUS)
    with pytest.raises(DownloadError) as caught:
        bring(RECIPE, tmp_path / "m", hub, prune=True)
    assert caught.value.code == "target_foreign" and not (tmp_path / "m/vae").exists()
    assert "paper.tex" in bring(RECIPE, tmp_path / "m", hub).untracked_files
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/x").write_bytes(PRECIOUS)
    (tmp_path / "m/link").symlink_to(tmp_path / "outside")
    assert {"paper.tex", "link"} < set(bring(RECIPE, tmp_path / "m", hub, prune=True).removed)
    assert (tmp_path / "outside/x").read_bytes() == PRECIOUS


@pytest.mark.parametrize(
    "files",
    [
        *([".git/config"], ["a/.GIT/config"], [".hg/hgrc"], ["x/.svn/a"], [".g\u200cit/config"], ["git~1/config"]),
        *(["sub/HEAD", "sub/objects/x", "sub/refs/x"], ["HEAD", "objects/x", "refs/x"]),
    ],
)
def test_a_repository_brings_no_repository(tmp_path: Path, files: list[str]) -> None:
    """Git runs commands that a repository's own configuration names."""
    with Hub({WEIGHTS: {**dict.fromkeys(files, b"x"), "f": b"1"}}) as hub:
        with pytest.raises(DownloadError) as caught:
            bring(Recipe("r", (Repository(WEIGHTS, (FileRule("*"),)),), MODEL_INDEX), tmp_path / "m", hub)
        assert caught.value.code == "path_unsafe" and hub.gets() == []
        bring(Recipe("r", (Repository(WEIGHTS, (FileRule("f"),)),), MODEL_INDEX), tmp_path / "m", hub)


@pytest.mark.parametrize(
    ("names", "code"),
    [
        (["a\u202eb"], "path_unsafe"),
        (["a\x7f"], "path_unsafe"),
        (["\u2024\u2024/x"], "path_unsafe"),
        (["\u00e9.txt", "e\u0301.txt"], "target_collision"),
        (["A.txt", "a.TXT"], "target_collision"),
    ],
)
def test_names_that_look_alike_or_look_like_nothing(tmp_path: Path, names: list[str], code: str) -> None:
    with Hub({WEIGHTS: dict.fromkeys(names, b"x")}) as hub:
        with pytest.raises(DownloadError) as caught:
            bring(Recipe("r", (Repository(WEIGHTS, (FileRule("*"),)),), MODEL_INDEX), tmp_path / "m", hub)
        assert caught.value.code == code and hub.gets() == []


# --- other hosts, and remains of an earlier run -----------------------------------------------------------------------


def test_partial_downloads_of_another_host_are_taken_over_under_a_lock_only(hub: Hub, tmp_path: Path) -> None:
    folder = abandoned(tmp_path / "m", hub)
    host = folder.name.replace(socket.gethostname()[:48], "elsewhere", 1)
    assert host != folder.name
    folder = folder.rename(folder.with_name(host))
    acquire(tmp_path / "m", spec_of(hub), 1 << 20, exclusive=False).discard()
    assert folder.exists()
    acquire(tmp_path / "m", spec_of(hub), 1 << 20, exclusive=True).discard()
    assert not folder.exists()


@pytest.mark.parametrize("works", [True, False])
def test_a_lock_that_does_nothing_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, works: bool) -> None:
    if not works:
        monkeypatch.setattr("fcntl.flock", lambda *_: None)
    with directory_lock(tmp_path, print) as exclusive:
        assert exclusive is works


def test_threads_take_turns_where_locks_do_nothing(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fcntl.flock", lambda *_: None)
    with ThreadPoolExecutor() as pool:
        runs = [pool.submit(bring, RECIPE, tmp_path / "m", hub) for _ in range(4)]
        assert [len(run.result(timeout=60).fetched) for run in runs].count(1) == 1
    assert (tmp_path / "m" / TARGET).read_bytes() == CONTENT and len(hub.gets()) == 1


def test_a_name_of_a_process_is_its_own(tmp_path: Path) -> None:
    child = subprocess.run(
        [sys.executable, "-c", "from port_kit.owner import owner; print(owner())"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert child.stdout.strip().partition("~")[0] == owner().partition("~")[0] and child.stdout.strip() != owner()


@pytest.mark.parametrize("state", ["absent", "zeros", "short", "other"])
def test_notes_about_a_finished_file_are_not_believed(hub: Hub, tmp_path: Path, state: str) -> None:
    """A journal and counts that say that all is there, over data of every kind."""
    once = Policy(attempts=1, base=0.01)
    hub.inject(Fault("get", cut=1000))
    with pytest.raises(DownloadError):
        bring(RECIPE, tmp_path / "m", hub, policy=once)
    (folder,) = (tmp_path / "m/.port_kit/parts").iterdir()
    (folder / "progress").write_bytes(len(CONTENT).to_bytes(8, "little"))
    contents = {"zeros": bytes(len(CONTENT)), "short": CONTENT[:5], "other": noise(len(CONTENT), 9)}
    (folder / "data").unlink() if state == "absent" else (folder / "data").write_bytes(contents[state])
    append_journal(tmp_path / "m", spec_of(hub), len(CONTENT), hashlib.sha256(CONTENT).hexdigest())
    if state in contents:
        (tmp_path / "m/vae").mkdir(exist_ok=True)
        (tmp_path / "m" / TARGET).write_bytes(contents[state])
    bring(RECIPE, tmp_path / "m", hub, policy=once)
    assert (tmp_path / "m" / TARGET).read_bytes() == CONTENT
    assert bring(RECIPE, tmp_path / "m", hub, verify=True, offline=True).complete and orphans(tmp_path / "m") == []


def test_a_journal_counts_for_its_own_revision(hub: Hub, tmp_path: Path) -> None:
    first = hub.commit(WEIGHTS)
    second = hub.push(WEIGHTS, {"f.safetensors": noise(len(CONTENT), 8)})
    stopping = Recipe(
        "r", (Repository(WEIGHTS, (FileRule("f.safetensors", "vae"),)), Repository(VAE, (FileRule("g"),))), MODEL_INDEX
    )
    with Hub({WEIGHTS: {"f.safetensors": CONTENT}, VAE: {"g": b"1"}}) as both:
        both.push(WEIGHTS, {"f.safetensors": noise(len(CONTENT), 8)})
        recipes = [stopping.with_(revisions={WEIGHTS: commit}) for commit in (first, second)]
        both.inject(Fault("get", "g", times=-1, status=403))
        for recipe in recipes:
            with pytest.raises(DownloadError):
                bring(recipe, tmp_path / "m", both, policy=Policy(files_at_once=1))
        both.faults.clear()
        bring(recipes[1], tmp_path / "m", both)
        stated = json.loads((tmp_path / "m/port.lock").read_text())["files"][TARGET]["final_sha256"]
        assert stated == hashlib.sha256(noise(len(CONTENT), 8)).hexdigest()
        assert bring(recipes[1], tmp_path / "m", both, verify=True, offline=True).complete


# --- the machine ------------------------------------------------------------------------------------------------------

CACHE = """
import sys
from port_kit.download import *
from port_kit.errors import DownloadError
index = {"_class_name": "T", "_diffusers_version": "1"}
recipe = Recipe("r", (Repository(sys.argv[1], (FileRule("f.safetensors"),)),), index)
try:
    print(download(recipe, sys.argv[2], token=None if sys.argv[3] == "token" else False).local_bytes)
except DownloadError as error:
    print(error.code, error.message)
"""


def run(hub: Hub, tmp_path: Path, what: str, **variables: str) -> str:
    """Download in a process to which rights on files matter."""
    command = [sys.executable, "-c", CACHE, WEIGHTS, str(tmp_path / "m"), what]
    environment = {**os.environ, **hub.environment, "HF_HOME": str(tmp_path / "hf"), **variables}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, preexec_fn=without_privileges, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("place", ["", "models--org--model", "models--org--model/snapshots", "file"])
def test_a_cache_that_may_not_be_read_is_not_used(hub: Hub, tmp_path: Path, place: str) -> None:
    snapshot = tmp_path / "hf/hub/models--org--model/snapshots" / hub.commit(WEIGHTS)
    snapshot.mkdir(parents=True)
    (snapshot / "f.safetensors").write_bytes(CONTENT)
    locked = snapshot / "f.safetensors" if place == "file" else tmp_path / "hf/hub" / place
    locked.chmod(0)
    try:
        assert run(hub, tmp_path, "") == "0"
    finally:
        locked.chmod(0o755)


@pytest.mark.parametrize("content", [b"hf_x", b"\xff\xfe"])
def test_a_token_file_that_cannot_be_read_is_named(hub: Hub, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/token").write_bytes(content)
    (tmp_path / "hf/token").chmod(0 if content.isascii() else 0o644)
    said = run(hub, tmp_path, "token")
    assert said.startswith("hub_token_invalid") and str(tmp_path / "hf/token") in said


@pytest.mark.parametrize("value", ["1", "on", "TRUE", "yes"])
def test_the_offline_variable_counts_in_python_too(hub: Hub, tmp_path: Path, value: str) -> None:
    assert run(hub, tmp_path, "", HF_HUB_OFFLINE=value).startswith("offline_incomplete") and hub.requests == []


def test_names_that_the_locale_cannot_write_are_named(tmp_path: Path) -> None:
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    with Hub({WEIGHTS: {"f.safetensors": b"1", "中.txt": b"2"}}) as hub:
        assert run(hub, tmp_path, "", **plain) == "0"
        script = CACHE.replace('"f.safetensors"', '"*"')
        command = [sys.executable, "-c", script, WEIGHTS, str(tmp_path / "n"), ""]
        done = subprocess.run(
            command, env={**os.environ, **hub.environment, **plain}, capture_output=True, text=True, timeout=300
        )
        assert done.stdout.startswith("path_unsafe"), done.stderr


@pytest.mark.parametrize("way", ["remove", "verify"])
def test_a_file_in_the_place_of_one_that_never_came_is_left(hub: Hub, tmp_path: Path, way: str) -> None:
    """A lock without the file's hash says that the kit did not create it."""
    hub.inject(Fault("get", "f.safetensors", times=-1, status=403))
    with pytest.raises(DownloadError):
        bring(RECIPE, tmp_path / "m", hub)
    hub.faults.clear()
    (tmp_path / "m/vae").mkdir(exist_ok=True)
    (tmp_path / "m" / TARGET).write_bytes(PRECIOUS)
    if way == "remove":
        assert TARGET in remove(tmp_path / "m").left
    else:
        with pytest.raises(DownloadError) as caught:
            bring(RECIPE, tmp_path / "m", hub, verify=True)
        assert caught.value.code == "target_foreign"
    assert (tmp_path / "m" / TARGET).read_bytes() == PRECIOUS
