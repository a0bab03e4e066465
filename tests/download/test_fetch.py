"""Bytes through bad networks: every fault ends in the right bytes, or in one clear error and no file."""

from __future__ import annotations

import email.utils
import hashlib
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from port_kit.download import FileRule, Policy, Recipe, Repository
from port_kit.download.incoming_file import IncomingFile
from port_kit.download.parts import ALIGNMENT, FileSpec, acquire
from port_kit.errors import DownloadError
from port_kit.testing.hub import Fault, Hub
from tests.download.helpers import EXPECTED, IMPATIENT, VAE, WEIGHTS, assert_whole, bring, noise
from tests.helpers import raises, wait_until

BIG = "big.safetensors"


def test_a_fresh_run_brings_everything_with_one_get_a_segment(hub: Hub, recipe: Recipe, tmp_path: Path) -> None:
    report = bring(recipe, tmp_path / "m", hub, policy=Policy(segment_size=1 << 20))
    assert_whole(tmp_path / "m")
    assert set(report.fetched) == set(EXPECTED)
    assert sum(request.sent for request in hub.gets()) == sum(map(len, EXPECTED.values()))
    assert [len(hub.gets(name)) for name in (BIG, "vae.safetensors", "words/spiece.model")] == [5, 1, 1]


def test_a_second_run_asks_nothing(hub: Hub, recipe: Recipe, tmp_path: Path) -> None:
    bring(recipe, tmp_path / "m", hub)
    hub.requests.clear()
    assert bring(recipe, tmp_path / "m", hub).plan is None
    assert hub.requests == []


@pytest.mark.parametrize("cut", [1, 1 << 19, (1 << 20) - 1])
@pytest.mark.parametrize("no_length", [False, True])
def test_a_body_that_ends_early_is_gone_on_with(
    hub: Hub, recipe: Recipe, tmp_path: Path, cut: int, no_length: bool
) -> None:
    hub.inject(Fault("get", BIG, cut=cut, no_length=no_length))
    bring(recipe, tmp_path / "m", hub)
    assert_whole(tmp_path / "m")
    assert sum(request.sent for request in hub.gets(BIG)) == len(EXPECTED[f"transformer/{BIG}"])


def test_three_resets_in_a_row_are_survived(hub: Hub, recipe: Recipe, tmp_path: Path) -> None:
    hub.inject(Fault("get", BIG, times=3, cut=200_000, reset=True))
    bring(recipe, tmp_path / "m", hub)
    assert_whole(tmp_path / "m")


@pytest.mark.parametrize("kind", ["revision", "tree", "head", "get"])
def test_a_silent_server_is_asked_again(hub: Hub, recipe: Recipe, tmp_path: Path, kind: str) -> None:
    hub.inject(Fault(kind, stall=1.5))
    bring(recipe.with_(revisions={WEIGHTS: None}), tmp_path / "m", hub)
    assert_whole(tmp_path / "m")


def test_silence_in_the_middle_of_a_body_is_asked_again(hub: Hub, recipe: Recipe, tmp_path: Path) -> None:
    hub.inject(Fault("get", BIG, stall=1.5, stall_at=300_000))
    bring(recipe, tmp_path / "m", hub)
    assert_whole(tmp_path / "m")


def test_bytes_that_are_sent_twice_and_differ_are_not_taken(recipe: Recipe, tmp_path: Path) -> None:
    """A broken transfer is answered with the complete file, corrupted in the hashed part: each byte is written once."""
    with Hub({WEIGHTS: {BIG: noise(5 << 20)}}) as hub:
        recipe = Recipe("r", (Repository(WEIGHTS, (FileRule(BIG),)),), recipe.model_index)
        hub.inject(Fault("get", BIG, cut=4 << 20), Fault("get", BIG, ignore_range=True, flip=12345))
        bring(recipe, tmp_path / "m", hub, policy=Policy(connections=1, base=0.02))
        assert (tmp_path / "m" / BIG).read_bytes() == noise(5 << 20)
        assert len(hub.gets(BIG)) == 2


@pytest.mark.parametrize("times", [1, -1])
def test_a_server_that_ignores_ranges(hub: Hub, recipe: Recipe, tmp_path: Path, times: int) -> None:
    hub.inject(Fault("get", BIG, times=times, ignore_range=True))
    bring(recipe, tmp_path / "m", hub)
    assert_whole(tmp_path / "m")


@pytest.mark.parametrize("connections", [1, 4])
def test_servers_that_disagree_about_the_etag_serve_one_file(
    hub: Hub, recipe: Recipe, tmp_path: Path, connections: int
) -> None:
    """ETags are opaque; the content has a hash."""
    hub.inject(*(Fault("get", BIG, headers={"ETag": f'"node{number % 3}"'}) for number in range(12)))
    hub.inject(Fault("get", BIG, skip=2, cut=100_000))
    policy = Policy(segment_size=1 << 20, connections=connections, base=0.02)
    bring(recipe, tmp_path / "m", hub, policy=policy)
    assert_whole(tmp_path / "m")
    assert sum(request.sent for request in hub.gets(BIG)) == len(EXPECTED[f"transformer/{BIG}"])
    assert not any("If-Range" in request.headers for request in hub.gets())


def test_a_resumed_file_that_became_another_one_begins_anew(hub: Hub, recipe: Recipe, tmp_path: Path) -> None:
    hub.inject(Fault("get", BIG, flip=5, cut=1 << 20), Fault("get", BIG, times=-1, cut=0))
    with pytest.raises(DownloadError):
        bring(recipe, tmp_path / "m", hub, policy=Policy(attempts=2, base=0.01, segment_size=8 << 20, connections=1))
    hub.faults.clear()
    hub.requests.clear()
    bring(recipe, tmp_path / "m", hub, policy=Policy(segment_size=8 << 20, connections=1))
    assert_whole(tmp_path / "m")
    assert [request.status for request in hub.gets(BIG)] == [206, 200]


def test_a_range_from_another_offset_is_noticed(hub: Hub, recipe: Recipe, tmp_path: Path) -> None:
    hub.inject(Fault("get", BIG, times=2, shift_range=5))
    bring(recipe, tmp_path / "m", hub)
    assert_whole(tmp_path / "m")
    hub.inject(Fault("get", BIG, times=-1, shift_range=5))
    with raises("network", "big.safetensors"):
        bring(recipe, tmp_path / "n", hub)
    assert not (tmp_path / "n/transformer/big.safetensors").exists()


def test_a_flipped_byte_is_fetched_again_once(hub: Hub, recipe: Recipe, tmp_path: Path) -> None:
    hub.inject(Fault("get", BIG, times=1, flip=12345))
    bring(recipe, tmp_path / "m", hub, policy=Policy(segment_size=8 << 20))
    assert_whole(tmp_path / "m")
    assert len(hub.gets(BIG)) == 2


def test_a_byte_that_is_always_flipped_leaves_no_file(hub: Hub, recipe: Recipe, tmp_path: Path) -> None:
    hub.inject(Fault("get", "words/spiece.model", times=-1, flip=100))
    with raises("hash_mismatch", "words/spiece.model"):
        bring(recipe, tmp_path / "m", hub)
    assert not (tmp_path / "m/tokenizer/spiece.model").exists()
    assert not (tmp_path / "m/model_index.json").exists()


@pytest.mark.parametrize("kind", ["revision", "tree", "tree2", "head", "get"])
@pytest.mark.parametrize("status", [503, 500, 429, 408])
def test_two_server_errors_in_a_row_are_survived(recipe: Recipe, tmp_path: Path, kind: str, status: int) -> None:
    with Hub({WEIGHTS: {BIG: b"x" * 1000, "a": b"1", "b": b"2"}}, page_size=2) as hub:
        hub.inject(Fault(kind, times=2, status=status))
        recipe = Recipe("r", (Repository(WEIGHTS, (FileRule(BIG),)),), recipe.model_index)
        bring(recipe, tmp_path / "m", hub)
        assert (tmp_path / "m" / BIG).read_bytes() == b"x" * 1000


def _date() -> str:
    return email.utils.formatdate(time.time() + 2, usegmt=True)


@pytest.mark.parametrize("header", ["seconds", "date", "ratelimit"])
def test_the_server_says_when_to_come_back(hub: Hub, recipe: Recipe, tmp_path: Path, header: str) -> None:
    headers = {
        "seconds": {"Retry-After": "1"},
        "date": {"Retry-After": _date()},
        "ratelimit": {"RateLimit": '"api";r=0;t=1'},
    }[header]
    hub.inject(Fault("get", BIG, status=429, headers=headers))
    begun = time.monotonic()
    bring(recipe, tmp_path / "m", hub)
    assert time.monotonic() - begun > 0.8
    assert_whole(tmp_path / "m")
    segments = -(-len(EXPECTED[f"transformer/{BIG}"]) // IMPATIENT.segment_size)
    assert len(hub.gets(BIG)) == segments + 1


def test_a_long_wait_is_refused_at_once(hub: Hub, recipe: Recipe, tmp_path: Path) -> None:
    hub.inject(Fault("get", BIG, times=-1, status=429, headers={"Retry-After": "3600"}))
    one = Policy(connections=1, files_at_once=1, longest=5)
    with raises("server_busy", "3600 s"):
        bring(recipe, tmp_path / "m", hub, policy=one)
    assert len(hub.gets(BIG)) == 1


@pytest.mark.parametrize("kind", ["tree", "head", "get"])
def test_repeated_errors_end_after_the_attempts_of_the_policy(
    hub: Hub, recipe: Recipe, tmp_path: Path, kind: str
) -> None:
    hub.inject(Fault(kind, times=-1, status=500))
    one = Policy(connections=1, files_at_once=1, attempts=4, base=0.02)
    with raises("network"):
        bring(recipe.with_(revisions={}), tmp_path / "m", hub, policy=one)
    assert [request.kind for request in hub.requests].count(kind) == 4


def test_another_host_never_sees_the_token(recipe: Recipe, tmp_path: Path) -> None:
    with Hub({VAE: {"vae.safetensors": noise(1000)}}, cdn=True, token="secret-token", gated=(VAE,)) as hub:
        recipe = Recipe("r", (Repository(VAE, (FileRule("vae.safetensors"),)),), recipe.model_index)
        bring(recipe, tmp_path / "m", hub, token="secret-token")
        cdn = [request for request in hub.requests if request.host == "cdn"]
        assert cdn and not any("Authorization" in request.headers for request in cdn)
        own = [request for request in hub.requests if request.host == "hub"]
        assert all(request.headers.get("Authorization") == "Bearer secret-token" for request in own)


def test_an_aged_redirect_is_asked_for_again(recipe: Recipe, tmp_path: Path) -> None:
    with Hub({VAE: {"vae.safetensors": noise(5 << 20)}}, cdn=True) as hub:
        recipe = Recipe("r", (Repository(VAE, (FileRule("vae.safetensors"),)),), recipe.model_index)
        one = Policy(connections=1, segment_size=1 << 20, base=0.02)
        bring(recipe, tmp_path / "m", hub, policy=one)
        assert [request.host for request in hub.gets()] == ["hub", *["cdn"] * 5]
        hub.requests.clear()
        hub.inject(Fault("get", status=403, host="cdn"))
        with raises("hub_refused", "403"):
            bring(recipe, tmp_path / "n", hub, policy=one)
        hub.inject(Fault("get", status=403, host="cdn", skip=2))
        bring(recipe, tmp_path / "n", hub, policy=one)
        assert (tmp_path / "n/vae.safetensors").read_bytes() == noise(5 << 20)


def test_old_bytes_are_never_taken_for_a_new_commit(hub: Hub, recipe: Recipe, tmp_path: Path) -> None:
    bring(recipe, tmp_path / "m", hub)
    commit = hub.push(VAE, {"vae.safetensors": noise(300_000, 9)})
    hub.inject(Fault("head", times=-1, status=500), Fault("get", times=-1, status=500))
    with pytest.raises(DownloadError):
        bring(recipe.with_(revisions={VAE: commit}), tmp_path / "m", hub)
    hub.faults.clear()
    bring(recipe.with_(revisions={VAE: commit}), tmp_path / "m", hub)
    assert (tmp_path / "m/vae/vae.safetensors").read_bytes() == noise(300_000, 9)


def test_a_dead_proxy_is_not_used_where_no_proxy_says_so(
    hub: Hub, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    bring(recipe, tmp_path / "m", hub)
    assert_whole(tmp_path / "m")
    monkeypatch.setenv("NO_PROXY", "")
    monkeypatch.delenv("no_proxy", raising=False)
    with raises("network"):
        bring(recipe, tmp_path / "n", hub)


def test_a_plain_http_proxy_is_asked_with_whole_urls(
    hub: Hub, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Hub(dict.fromkeys([WEIGHTS], {"x": b""})) as proxy:
        monkeypatch.setenv("http_proxy", proxy.endpoint)
        monkeypatch.setenv("NO_PROXY", "")
        with pytest.raises(DownloadError):
            bring(recipe, tmp_path / "m", hub, policy=Policy(attempts=1))
        assert proxy.requests and not hub.requests


def test_all_files_through_one_connection(hub: Hub, recipe: Recipe, tmp_path: Path) -> None:
    bring(recipe, tmp_path / "m", hub, policy=Policy(connections=1, files_at_once=1, segment_size=100_000))
    assert_whole(tmp_path / "m")


def test_segments_of_one_file_are_fetched_concurrently(tmp_path: Path, recipe: Recipe) -> None:
    with Hub({WEIGHTS: {BIG: noise(8 << 20)}}, bytes_per_second=1 << 20) as hub, ThreadPoolExecutor() as pool:
        recipe = Recipe("r", (Repository(WEIGHTS, (FileRule(BIG),)),), recipe.model_index)
        four = Policy(connections=4, segment_size=2 << 20)
        run = pool.submit(bring, recipe, tmp_path / "m", hub, policy=four)
        wait_until(lambda: len(hub.gets()) == 4)
        assert all(request.sent < 2 << 20 for request in hub.gets())  # none has ended when the last one starts
        assert run.result(timeout=60).complete


def test_large_files_are_cut_so_that_all_connections_end_together() -> None:
    policy = Policy(connections=8)
    assert policy.segment_for(64 << 20) == policy.segment_for(100 << 30) == 64 << 20
    assert policy.segment_for(65 << 20) == 16 << 20
    assert policy.segment_for(1 << 30) == 32 << 20
    assert Policy(connections=1).segment_for(1 << 30) == 1 << 30
    assert Policy(connections=1, segment_size=64 << 20).segment_for(1 << 30) == 64 << 20


def test_impatience_is_a_policy() -> None:
    assert IMPATIENT.pause(1) < IMPATIENT.pause(4) <= IMPATIENT.longest * 1.25


def test_writes_past_the_cache_are_right_wherever_they_begin(tmp_path: Path) -> None:
    """Complete pages bypass the page cache; other bytes are written through it."""
    content = noise(5 * ALIGNMENT + 100)
    spec = FileSpec("f", WEIGHTS, "0" * 40, "f", len(content), f"sha256:{hashlib.sha256(content).hexdigest()}")
    partial = acquire(tmp_path, spec, 1 << 20, exclusive=True)
    incoming, (segment,) = IncomingFile(partial, None, None), partial.segments
    pieces = [(0, 1, ALIGNMENT), (1, 0, ALIGNMENT), (2, 0, 100), (2, 10, ALIGNMENT // 2), (2.5, 0, ALIGNMENT)]
    pieces += [(1, 0, ALIGNMENT), (4, 0, 100), (3.5, 0, ALIGNMENT), (4.5, 0, ALIGNMENT // 2), (5, 0, ALIGNMENT)]
    for pages, begin, count in pieces:  # an address within a page, a short piece, overlaps, gaps, more than the rest
        offset, buffer = int(pages * ALIGNMENT), incoming.take_buffer()
        piece = content[offset : offset + count].ljust(count, b"?")
        buffer.memory[begin : begin + count] = piece
        incoming._handed.clear()  # no thread hashes in this test
        incoming.write(segment, offset, buffer, begin, count)
    assert segment.is_complete
    partial.publish(tmp_path, len(content))
    assert (tmp_path / "f").read_bytes() == content
