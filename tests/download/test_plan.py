"""Plans: facts and errors that are known before the first large transfer."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from port_kit.download import FileRule, Policy, Recipe, Repository
from port_kit.errors import DownloadError
from port_kit.testing.hub import Fault, Hub
from tests.download.helpers import EXPECTED, FILES, MODEL_INDEX, VAE, VOCAB, WEIGHTS, bring, hashes, noise


def only(*rules: FileRule, repo_id: str = WEIGHTS, revision: str | None = None) -> Recipe:
    """A recipe of one repository."""
    index = {"_class_name": "T", "_diffusers_version": "1"}
    return Recipe("one", (Repository(repo_id, rules, revision),), index)


def refused(recipe: Recipe, directory: Path, hub: Hub, **options: object) -> DownloadError:
    """Return the error of a run that must fail, before any GET of a file."""
    hub.requests.clear()
    with pytest.raises(DownloadError) as caught:
        bring(recipe, directory, hub, **options)
    assert hub.gets() == []
    assert not (directory / "model_index.json").exists()
    return caught.value


def test_a_dry_run_writes_nothing_and_counts_right(hub: Hub, recipe: Recipe, tmp_path: Path) -> None:
    plan = bring(recipe, tmp_path / "m", hub, dry_run=True).plan
    assert plan is not None and not (tmp_path / "m").exists() and hub.gets() == []
    assert plan.bytes_to_fetch == sum(map(len, EXPECTED.values()))
    assert bring(recipe, tmp_path / "m", hub).network_bytes == plan.bytes_to_fetch
    listed = plan.to_json()
    assert {item["target"] for item in listed["files"]} == set(EXPECTED)
    assert listed["revisions"][WEIGHTS] == hub.commit(WEIGHTS)
    rows = {target: line for line in plan.describe().splitlines() for target in EXPECTED if f" {target} " in line}
    assert set(rows) == set(EXPECTED)
    assert len({line.index(target) for target, line in rows.items()}) == 1, "the columns are aligned"
    before = hashes(tmp_path / "m")
    again = bring(recipe, tmp_path / "m", hub, dry_run=True).plan
    assert again is not None and again.bytes_to_fetch == 0 and hashes(tmp_path / "m") == before


def test_a_pattern_that_matches_nothing_names_near_files(hub: Hub, tmp_path: Path) -> None:
    error = refused(only(FileRule("bigg.safetensors")), tmp_path / "m", hub)
    assert error.code == "pattern_empty" and "big.safetensors" in error.hint


def test_the_plan_tells_terms(hub: Hub, tmp_path: Path) -> None:
    repository = Repository(WEIGHTS, (FileRule("README.md"),), licence="research only", gated=True)
    plan = bring(Recipe("r", (repository,), MODEL_INDEX), tmp_path / "m", hub, dry_run=True).plan
    assert plan is not None and plan.to_json()["gated"] == [WEIGHTS]
    assert "licence: research only  (its terms must be accepted on the Hub)" in plan.describe()


def test_all_pages_of_a_long_tree_are_read(tmp_path: Path) -> None:
    files = {f"many/{number:04}.txt": b"%d" % number for number in range(2500)}
    with Hub({WEIGHTS: files}) as hub:
        plan = bring(only(FileRule("many/*", "many")), tmp_path / "m", hub, dry_run=True).plan
        assert plan is not None and len(plan.fetch) == 2500
        assert [request.kind for request in hub.requests].count("tree2") == 2


def test_the_next_page_on_another_host_is_refused(tmp_path: Path) -> None:
    with Hub({WEIGHTS: {"a": b"1", "b": b"2"}}, page_size=1, token="secret") as hub, Hub({}) as other:
        link = f'<{other.endpoint}/api/models/{WEIGHTS}/tree/x?cursor=1>; rel="next"'
        hub.inject(Fault("tree", headers={"Link": link}))
        error = refused(only(FileRule("*")), tmp_path / "m", hub, token="secret")
        assert error.code == "hub_foreign_link" and other.requests == []


@pytest.mark.parametrize("path", ["../x", "a/../../x", "C:/x", "a\\b", "a/CON", "nul.txt", ".port_kit/lock", "a/b. "])
def test_dangerous_paths_in_a_tree_are_refused(tmp_path: Path, path: str) -> None:
    with Hub({WEIGHTS: {path: b"1"}}) as hub:
        assert refused(only(FileRule("*", "c")), tmp_path / "m", hub).code == "path_unsafe"


@pytest.mark.parametrize("folder", ["/etc", "..", "a/../..", "c:"])
def test_dangerous_folders_in_a_recipe_are_refused(hub: Hub, tmp_path: Path, folder: str) -> None:
    assert refused(only(FileRule("big.safetensors", folder)), tmp_path / "m", hub).code == "path_unsafe"


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (FileRule("big.safetensors", "c", "x"), FileRule("README.md", "c", "x")),
        (FileRule("big.safetensors", "c", "x"), FileRule("README.md", "c", "X")),
        (FileRule("big.safetensors", "c", "x"), FileRule("README.md", "c/x", "y")),
        (FileRule("big.safetensors", "", "model_index.json"), FileRule("README.md", "c")),
        (FileRule("*", "c", "one-name"), FileRule("README.md", "d")),
    ],
)
def test_two_files_in_one_place_are_refused(hub: Hub, tmp_path: Path, first: FileRule, second: FileRule) -> None:
    assert refused(only(first, second), tmp_path / "m", hub).code == "target_collision"


def test_two_repositories_in_one_place_are_refused(hub: Hub, recipe: Recipe, tmp_path: Path) -> None:
    rules = (FileRule("vae.safetensors", "transformer", "big.safetensors"),)
    both = Recipe("two", (recipe.repositories[0], Repository(VAE, rules)), recipe.model_index)
    error = refused(both, tmp_path / "m", hub)
    assert error.code == "target_collision" and WEIGHTS in error.message and VAE in error.message


def test_six_refusals_of_the_hub_are_six_messages(tmp_path: Path) -> None:
    files = {"f.safetensors": b"1"}
    rule = FileRule("f.safetensors")
    repositories = {WEIGHTS: files, VAE: files, VOCAB: files}
    with Hub(repositories, token="good", gated=(VAE,), private=(VOCAB,), granted=False) as hub:
        found = {
            "no repository": refused(only(rule, repo_id="no/such"), tmp_path / "m", hub, token="good"),
            "no revision": refused(only(rule, revision="0" * 40), tmp_path / "m", hub),
            "no file": refused(only(FileRule("nothing")), tmp_path / "m", hub),
            "no token": refused(only(rule, repo_id=VOCAB), tmp_path / "m", hub),
            "bad token": refused(only(rule), tmp_path / "m", hub, token="bad"),
            "gated, no token": refused(only(rule, repo_id=VAE), tmp_path / "m", hub),
            "gated, not granted": refused(only(rule, repo_id=VAE), tmp_path / "m", hub, token="good"),
        }
    codes = {name: error.code for name, error in found.items()}
    assert codes == {
        "no repository": "hub_repo_missing",
        "no revision": "hub_revision_missing",
        "no file": "pattern_empty",
        "no token": "hub_token_missing",
        "bad token": "hub_token_invalid",
        "gated, no token": "hub_gated",
        "gated, not granted": "hub_gated",
    }
    assert len({error.message for error in found.values()}) == len(found)
    assert all(error.hint and "good" not in str(error) for error in found.values())


def test_a_file_that_vanished_from_a_commit_is_named(hub: Hub, recipe: Recipe, tmp_path: Path) -> None:
    missing = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": hub.commit(WEIGHTS)}
    hub.inject(Fault("head", "big.safetensors", status=404, headers=missing))
    error = refused(recipe, tmp_path / "m", hub)
    assert error.code == "hub_file_missing" and "big.safetensors" in error.message


def test_a_gate_is_found_before_any_large_get(recipe: Recipe, tmp_path: Path) -> None:
    with Hub(FILES, gated=(VOCAB,)) as hub:
        unpinned = recipe.with_(revisions=dict.fromkeys([WEIGHTS, VAE, VOCAB]))
        assert refused(unpinned, tmp_path / "m", hub).code == "hub_gated"


def test_a_place_that_is_no_hub_is_named(tmp_path: Path) -> None:
    with Hub({WEIGHTS: {"f": b"1"}}) as hub:
        hub.inject(Fault("revision", status=200, body=b"<html>Welcome</html>"))
        error = refused(only(FileRule("f")), tmp_path / "m", hub)
        assert error.code == "hub_endpoint" and hub.endpoint in error.message and "<html>" in error.message
        hub.inject(Fault("head", headers={"X-Repo-Commit": ""}))
        error = refused(only(FileRule("f")), tmp_path / "m", hub)
        assert error.code == "hub_endpoint" and "X-Repo-Commit" in error.message


def test_a_pinned_hash_that_the_hub_does_not_state_is_refused(hub: Hub, tmp_path: Path) -> None:
    rule = FileRule("big.safetensors", sha256="0" * 64)
    assert refused(only(rule), tmp_path / "m", hub).code == "hash_mismatch"


def test_a_moved_branch_is_reported_and_a_pin_is_kept(hub: Hub, recipe: Recipe, tmp_path: Path) -> None:
    free = recipe.with_(revisions={VAE: None})
    bring(free, tmp_path / "m", hub)
    old, new = hub.commit(VAE), hub.push(VAE, {"vae.safetensors": noise(10, 5)})
    assert bring(free, tmp_path / "m", hub).plan is None
    plan = bring(free, tmp_path / "m", hub, update=True, dry_run=True).plan
    assert plan is not None and old in plan.notes[0] and new in plan.notes[0]
    bring(free, tmp_path / "m", hub, update=True)
    assert (tmp_path / "m/vae/vae.safetensors").read_bytes() == noise(10, 5)
    assert bring(recipe.with_(revisions={VAE: old}), tmp_path / "n", hub).complete
    assert (tmp_path / "n/vae/vae.safetensors").read_bytes() == FILES[VAE]["vae.safetensors"]


def stated(hub: Hub, sizes: dict[str, int]) -> list[Fault]:
    """Return the requests that state these sizes, each once."""
    sha256 = "0" * 64
    return [
        Fault(
            "tree",
            repo_id,
            status=200,
            body=json.dumps(
                [{"type": "file", "path": "f", "oid": "1" * 40, "size": 1, "lfs": {"oid": sha256, "size": size}}]
            ).encode(),
        )
        for repo_id, size in sizes.items()
    ]


def test_a_disk_that_all_repositories_together_overfill_is_noticed_before_the_first_byte(tmp_path: Path) -> None:
    """Each fits, both do not: by the real free space of the disk that the tests run on."""
    free = shutil.disk_usage(tmp_path).free
    both = Recipe("two", (Repository(WEIGHTS, (FileRule("f"),)), Repository(VAE, (FileRule("f", "vae"),))), MODEL_INDEX)
    with Hub({WEIGHTS: {"f": b"1"}, VAE: {"f": b"1"}}) as hub:
        hub.inject(*stated(hub, {WEIGHTS: free * 6 // 10, VAE: free * 6 // 10}))
        error = refused(both, tmp_path / "m", hub)
        assert error.code == "disk_full" and "are free" in error.message
        assert error.details["needed"] > free * 11 // 10 and error.details["free"] < free * 11 // 10
        hub.inject(*stated(hub, {WEIGHTS: free * 6 // 10}))
        assert bring(only(FileRule("f")), tmp_path / "n", hub, dry_run=True).plan is not None


def test_a_disk_that_fills_up_midway_is_named_and_the_part_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system says that no space is left for the last of its bytes."""

    def pwrite(descriptor: int, data: bytes, offset: int) -> int:
        if offset >= 3 << 20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data, offset)

    write, once = os.pwrite, Policy(attempts=1, connections=1, segment_size=8 << 20)
    with Hub({WEIGHTS: {"f": noise(4 << 20)}}) as hub, monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", pwrite)
        with pytest.raises(DownloadError) as caught:
            bring(only(FileRule("f")), tmp_path / "m", hub, policy=once)
        assert caught.value.code == "disk_full" and not (tmp_path / "m/f").exists()
        patch.undo()
        hub.requests.clear()
        bring(only(FileRule("f")), tmp_path / "m", hub, policy=once)
        assert (tmp_path / "m/f").read_bytes() == noise(4 << 20) and hub.gets()[0].sent <= 1 << 20


def test_a_disk_that_is_full_when_a_file_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All bytes are there: the next run only renames the file."""

    def append_journal(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with Hub({WEIGHTS: {"f": noise(2 << 20)}}) as hub, monkeypatch.context() as patch:
        patch.setattr("port_kit.download.fetch.append_journal", append_journal)
        with pytest.raises(DownloadError) as caught:
            bring(only(FileRule("f")), tmp_path / "m", hub)
        assert caught.value.code == "disk_full" and not (tmp_path / "m/f").exists()
        patch.undo()
        hub.requests.clear()
        bring(only(FileRule("f")), tmp_path / "m", hub)
        assert (tmp_path / "m/f").read_bytes() == noise(2 << 20) and hub.gets() == []


def test_a_file_that_the_disk_holds_no_more_of_is_named_and_gone_on_with(tmp_path: Path) -> None:
    """FAT holds 4 GB a file; here `ulimit -f` makes the system reject a write in the middle of the file."""
    with Hub({WEIGHTS: {"f": noise(6 << 20)}}) as hub:
        script = (
            "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (3 << 20, 3 << 20))\n"
            "from port_kit.download import *; from port_kit.errors import DownloadError\n"
            f"recipe = Recipe('one', (Repository({WEIGHTS!r}, (FileRule('f'),)),), {MODEL_INDEX!r})\n"
            f"try: download(recipe, {str(tmp_path / 'm')!r}, endpoint={hub.endpoint!r}, token=False)\n"
            "except DownloadError as error: print(error.code)"
        )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=300)
        assert done.stdout == "file_too_large\n", done.stderr
        assert not (tmp_path / "m/f").exists()
        hub.requests.clear()
        bring(only(FileRule("f")), tmp_path / "m", hub)
        assert (tmp_path / "m/f").read_bytes() == noise(6 << 20)
        assert sum(request.sent for request in hub.gets()) <= 4 << 20


@pytest.mark.parametrize("name", ["ünïcode ordner", "with blank", "x" * 200])
def test_unusual_directories(hub: Hub, recipe: Recipe, tmp_path: Path, name: str) -> None:
    assert bring(recipe, tmp_path / name / "m", hub).complete


def test_a_directory_behind_a_link(hub: Hub, recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    bring(recipe, tmp_path / "link", hub)
    assert (tmp_path / "real/model_index.json").is_file() and (tmp_path / "link").is_symlink()


def test_a_file_in_the_place_of_the_directory(hub: Hub, recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "m").write_text("x")
    with pytest.raises(DownloadError) as caught:
        bring(recipe, tmp_path / "m", hub)
    assert caught.value.code == "output_dir" and hub.requests == []
