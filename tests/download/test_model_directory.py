"""Model directories after a download: verified, repaired, offline, pruned, removed, and without secrets."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from port_kit.download import FileRule, Recipe, Repository
from port_kit.download.progress import LineProgress
from port_kit.download.remove import remove
from port_kit.errors import DownloadError
from port_kit.testing.hub import Hub
from tests.download.helpers import EXPECTED, MODEL_INDEX, VAE, VOCAB, WEIGHTS, assert_whole, bring, hashes, noise
from tests.helpers import raises

BIG = "transformer/big.safetensors"


def spoil(path: Path, how: str) -> None:
    """Damage a file and keep its time."""
    times = (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    content = bytearray(path.read_bytes())
    if how == "deleted":
        path.unlink()
        return
    if how == "edited":
        content[1000] ^= 1
    path.write_bytes(content[:-1] if how == "truncated" else content)
    os.utime(path, ns=times)


@pytest.mark.parametrize("how", ["truncated", "deleted"])
def test_a_rerun_repairs_what_a_size_tells(hub: Hub, recipe: Recipe, tmp_path: Path, how: str) -> None:
    bring(recipe, tmp_path / "m", hub)
    hub.requests.clear()
    spoil(tmp_path / "m/vae/vae.safetensors", how)
    assert bring(recipe, tmp_path / "m", hub).fetched == ("vae/vae.safetensors",)
    assert_whole(tmp_path / "m")
    assert [request.kind for request in hub.requests] == ["head", "get"]


@pytest.mark.parametrize("how", ["truncated", "deleted", "edited"])
def test_verify_finds_and_repairs_that_file_alone(hub: Hub, recipe: Recipe, tmp_path: Path, how: str) -> None:
    bring(recipe, tmp_path / "m", hub)
    spoil(tmp_path / "m" / BIG, how)
    with pytest.raises(DownloadError) as caught:
        bring(recipe, tmp_path / "m", hub, verify=True, offline=True)
    assert caught.value.code == "offline_incomplete" and BIG in caught.value.message
    hub.requests.clear()
    report = bring(recipe, tmp_path / "m", hub, verify=True)
    assert list(report.repaired) == [BIG] and report.fetched == (BIG,)
    assert {request.path.rpartition("/")[2] for request in hub.gets()} == {"big.safetensors"}
    assert_whole(tmp_path / "m")


def test_verify_repairs_a_configuration(hub: Hub, recipe: Recipe, tmp_path: Path) -> None:
    bring(recipe, tmp_path / "m", hub)
    hub.requests.clear()
    spoil(tmp_path / "m/model_index.json", "truncated")
    (tmp_path / "m/transformer/config.json").write_text("{}")
    assert set(bring(recipe, tmp_path / "m", hub, verify=True).repaired) == {
        "model_index.json",
        "transformer/config.json",
    }
    assert json.loads((tmp_path / "m/transformer/config.json").read_text()) == {"layers": 2}
    assert hub.gets() == []


def test_offline_needs_everything_and_asks_nothing(hub: Hub, recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(DownloadError) as caught:
        bring(recipe, tmp_path / "m", hub, offline=True)
    assert caught.value.code == "offline_incomplete" and not (tmp_path / "m").exists()
    bring(recipe, tmp_path / "m", hub)
    hub.requests.clear()
    assert bring(recipe, tmp_path / "m", hub, offline=True).complete
    (tmp_path / "m/vae/vae.safetensors").unlink()
    with raises("offline_incomplete", "vae/vae.safetensors"):
        bring(recipe, tmp_path / "m", hub, offline=True)
    assert hub.requests == []


def test_offline_can_do_the_last_step(hub: Hub, recipe: Recipe, tmp_path: Path) -> None:
    bring(recipe, tmp_path / "m", hub)
    (tmp_path / "m/model_index.json").unlink()
    assert bring(recipe, tmp_path / "m", hub, offline=True).complete
    assert_whole(tmp_path / "m")


def test_model_index_is_last_and_whole(hub: Hub, recipe: Recipe, tmp_path: Path) -> None:
    bring(recipe, tmp_path / "m", hub)
    index = tmp_path / "m/model_index.json"
    assert json.loads(index.read_text()) == MODEL_INDEX
    others = [path for path in (tmp_path / "m").rglob("*") if path.is_file() and path != index and path.name != "lock"]
    assert all(path.stat().st_mtime_ns <= index.stat().st_mtime_ns for path in others)


def test_the_lock_says_what_was_used(hub: Hub, recipe: Recipe, tmp_path: Path) -> None:
    bring(recipe.with_(revisions={VAE: None}), tmp_path / "m", hub)
    lock = json.loads((tmp_path / "m/port.lock").read_text())
    assert lock["revisions"][VAE] == hub.commit(VAE) and lock["unconfirmed"] == [VAE] and lock["complete"]
    assert lock["files"][BIG]["final_sha256"] == hashes(tmp_path / "m")[BIG]
    assert lock["files"][BIG]["digest"] == f"sha256:{hub.file(WEIGHTS, 'big.safetensors').sha256}"


def test_a_broken_lock_is_named(hub: Hub, recipe: Recipe, tmp_path: Path) -> None:
    bring(recipe, tmp_path / "m", hub)
    (tmp_path / "m/port.lock").write_text("{")
    with pytest.raises(DownloadError) as caught:
        bring(recipe, tmp_path / "m", hub)
    assert caught.value.code == "lock_invalid"
    (tmp_path / "m/port.lock").unlink()
    hub.requests.clear()
    bring(recipe, tmp_path / "m", hub)
    assert hub.gets() == []
    assert_whole(tmp_path / "m")


def test_foreign_files_are_adopted_by_hash_and_never_overwritten(hub: Hub, recipe: Recipe, tmp_path: Path) -> None:
    place = tmp_path / "m" / BIG
    place.parent.mkdir(parents=True)
    place.write_bytes(EXPECTED[BIG])
    assert BIG not in bring(recipe, tmp_path / "m", hub).fetched
    other = tmp_path / "n" / BIG
    other.parent.mkdir(parents=True)
    other.write_bytes(b"mine")
    with pytest.raises(DownloadError) as caught:
        bring(recipe, tmp_path / "n", hub)
    assert caught.value.code == "target_foreign" and other.read_bytes() == b"mine"
    other.unlink()
    (tmp_path / "n/model_index.json").write_text("{}")
    with pytest.raises(DownloadError) as caught:
        bring(recipe, tmp_path / "n", hub)
    assert caught.value.code == "target_foreign"


def test_another_recipe_takes_away_what_it_does_not_need(hub: Hub, recipe: Recipe, tmp_path: Path) -> None:
    bring(recipe, tmp_path / "m", hub)
    (tmp_path / "m/notes.txt").write_text("mine")
    smaller = Recipe("small", recipe.repositories[:2], MODEL_INDEX, recipe.configs)
    hub.requests.clear()
    report = bring(smaller, tmp_path / "m", hub)
    assert hub.gets() == []
    assert report.untracked_files == ("notes.txt",)
    assert set(report.removed) == {target for target in EXPECTED if target.startswith("tokenizer/")}
    assert not (tmp_path / "m/tokenizer").exists()
    assert bring(smaller, tmp_path / "m", hub, prune=True).removed == ("notes.txt",)
    assert not (tmp_path / "m/notes.txt").exists()


def test_remove_takes_exactly_what_was_put_there(hub: Hub, recipe: Recipe, tmp_path: Path) -> None:
    bring(recipe, tmp_path / "m", hub)
    (tmp_path / "m/transformer/mine.txt").write_text("x")
    done = remove(tmp_path / "m")
    assert done.left == ("transformer/mine.txt",) and not done.gone
    assert [path.name for path in (tmp_path / "m").rglob("*") if path.is_file()] == ["mine.txt"]
    with pytest.raises(DownloadError):
        remove(tmp_path / "m")
    bring(recipe, tmp_path / "n", hub)
    assert remove(tmp_path / "n").gone and not (tmp_path / "n").exists()


def test_the_hub_cache_is_used_after_its_hash_is_checked(
    hub: Hub, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants, hf_hub_download

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    commit = hub.commit(WEIGHTS)
    cached = hf_hub_download(
        WEIGHTS, "big.safetensors", revision=commit, endpoint=hub.endpoint, cache_dir=tmp_path / "cache", token=False
    )
    hub.requests.clear()
    report = bring(recipe, tmp_path / "m", hub, use_cache=True)
    assert hub.gets("big.safetensors") == [] and report.local_bytes == len(EXPECTED[BIG])
    assert_whole(tmp_path / "m")
    blob = Path(cached).resolve()
    blob.write_bytes(blob.read_bytes()[:-1] + b"?")
    bring(recipe, tmp_path / "n", hub, use_cache=True)
    assert hub.gets("big.safetensors")
    assert_whole(tmp_path / "n")


def test_the_token_appears_nowhere(hub: Hub, recipe: Recipe, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    secret = "hf_" + "s3cr3t" * 5
    bring(recipe, tmp_path / "m", hub, token=secret, progress=LineProgress())
    assert hub.requests[0].headers["Authorization"] == f"Bearer {secret}"
    with pytest.raises(DownloadError) as caught:
        bring(recipe.with_(revisions={VAE: "0" * 40}), tmp_path / "n", hub, token=secret)
    printed = capfd.readouterr()
    everything = printed.out + printed.err + repr(caught.value) + json.dumps(caught.value.details)
    for path in tmp_path.rglob("*"):
        everything += path.read_bytes().decode("latin-1") if path.is_file() else ""
    assert secret not in everything


def test_an_index_that_names_a_missing_shard_is_refused(tmp_path: Path) -> None:
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    files = {"model.safetensors.index.json": json.dumps(index).encode(), "model-00001-of-00002.safetensors": b"x"}
    with Hub({WEIGHTS: files}) as hub:
        recipe = Recipe("r", (Repository(WEIGHTS, (FileRule("*", "c"),)),), MODEL_INDEX)
        with raises("model_incomplete", "model-00002-of-00002"):
            bring(recipe, tmp_path / "m", hub)
        assert not (tmp_path / "m/model_index.json").exists()


def test_xet_headers_change_nothing(tmp_path: Path) -> None:
    """The Hub offers Xet and plain HTTP; plain HTTP is resumed and hashed."""
    from port_kit.testing.hub import Fault

    with Hub({WEIGHTS: {"f.safetensors": noise(100_000)}}) as hub:
        headers = {"X-Xet-Hash": "0" * 64, "Link": f'<{hub.endpoint}/xet>; rel="xet-auth"'}
        hub.inject(Fault("get", times=1, flip=5, headers=headers), Fault("get", times=-1, headers=headers))
        recipe = Recipe("r", (Repository(WEIGHTS, (FileRule("*", "c"),)),), MODEL_INDEX)
        bring(recipe, tmp_path / "m", hub)
        assert (tmp_path / "m/c/f.safetensors").read_bytes() == noise(100_000)
        assert len(hub.gets()) == 2


def test_progress_tells_each_file_and_all_bytes(hub: Hub, recipe: Recipe, tmp_path: Path) -> None:
    import io

    stream = io.StringIO()
    progress = LineProgress(stream)
    bring(recipe, tmp_path / "m", hub, progress=progress)
    assert progress.done == progress.total == sum(map(len, EXPECTED.values()))
    assert all(target in stream.getvalue() for target in EXPECTED)
    assert VOCAB not in stream.getvalue()
