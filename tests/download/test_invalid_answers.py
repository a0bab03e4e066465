"""Invalid answers of a Hub, invalid tokens and endpoints: the right bytes, or one error."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from port_kit.download import FileRule, Policy, Recipe, Repository
from port_kit.errors import DownloadError
from port_kit.testing.hub import Fault, Hub
from tests.download.helpers import MODEL_INDEX, WEIGHTS, bring, noise

BIG, SMALL = noise(2 << 20), b'{"a": 1}'
FILES = {"big.safetensors": BIG, "small.json": SMALL}
RECIPE = Recipe("r", (Repository(WEIGHTS, (FileRule("big.safetensors"), FileRule("small.json"))),), MODEL_INDEX)
ALL = Recipe("r", (Repository(WEIGHTS, (FileRule("*"),)),), MODEL_INDEX)
JSON = {"Content-Type": "application/json"}


@pytest.fixture
def hub() -> Iterator[Hub]:
    """A Hub with one large and one small file."""
    with Hub({WEIGHTS: FILES}) as running:
        yield running


def assert_right(directory: Path) -> None:
    """Both files have arrived."""
    assert {name: (directory / name).read_bytes() for name in FILES} == FILES


def refused(hub: Hub, directory: Path, recipe: Recipe = RECIPE, **options: object) -> DownloadError:
    """Return the error of a run that must fail."""
    with pytest.raises(DownloadError) as caught:
        bring(recipe, directory, hub, **options)
    assert not (directory / "model_index.json").exists() and caught.value.hint
    return caught.value


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_renamed_repository_is_followed(hub: Hub, tmp_path: Path, status: int) -> None:
    """As the Hub does it: every place of the old name leads to the same place of the new one."""
    commit = hub.push("new/name", FILES)
    places = {
        ("revision", "*"): "/api/models/new/name/revision/main",
        ("tree", "*"): f"/api/models/new/name/tree/{commit}?recursive=true",
        ("head", "*"): f"/new/name/resolve/{commit}/big.safetensors",
        **{("get", name): f"/new/name/resolve/{commit}/{name}" for name in FILES},
    }
    hub.inject(*(Fault(*place, status=status, headers={"Location": to}) for place, to in places.items()))
    bring(RECIPE, tmp_path / "m", hub, policy=Policy(base=0.02))
    assert_right(tmp_path / "m")
    assert [request.status for request in hub.requests].count(status) == 5


def test_a_renamed_repository_at_another_host_gets_no_token(hub: Hub, tmp_path: Path) -> None:
    with Hub({WEIGHTS: FILES}) as other:
        place = f"{other.endpoint}/api/models/{WEIGHTS}/revision/main"
        hub.inject(Fault("revision", status=307, headers={"Location": place}))
        bring(RECIPE, tmp_path / "m", hub, token="hf_secret")
        assert other.requests and not any("Authorization" in request.headers for request in other.requests)
    assert_right(tmp_path / "m")


@pytest.mark.parametrize("token", [False, "hf_secret"])
@pytest.mark.parametrize(
    "location",
    ["http://[bad/", "http://host:99999/x", "http://ünï.example/ö", "ftp://x/y", "//", "/a b", "javascript:1", "\x00"],
)
def test_a_redirect_to_nowhere_is_named(hub: Hub, tmp_path: Path, location: str, token: str | bool) -> None:
    hub.inject(Fault("get", "big*", times=-1, status=302, headers={"Location": location}))
    assert refused(hub, tmp_path / "m", token=token).code == "network"
    hub.faults.clear()
    bring(RECIPE, tmp_path / "m", hub)
    assert_right(tmp_path / "m")


@pytest.mark.parametrize(
    "headers",
    [
        {"Retry-After": "\xb2"},
        {"Retry-After": "-5"},
        {"Retry-After": "soon"},
        {"Retry-After": "Mon, 01 Jan 0001 00:00:00 GMT"},
        {"RateLimit": '"x";r=0;t=\xb2'},
    ],
)
def test_a_wait_that_cannot_be_read_is_a_usual_pause(hub: Hub, tmp_path: Path, headers: dict[str, str]) -> None:
    hub.inject(Fault("get", "big*", status=429, headers=headers))
    bring(RECIPE, tmp_path / "m", hub)
    assert_right(tmp_path / "m")


@pytest.mark.parametrize("wait", ["Fri, 31 Dec 9999 23:59:59 GMT", "9" * 400])
def test_a_wait_without_end_is_refused(hub: Hub, tmp_path: Path, wait: str) -> None:
    hub.inject(Fault("get", "big*", times=-1, status=503, headers={"Retry-After": wait}))
    assert refused(hub, tmp_path / "m").code == "server_busy"


@pytest.mark.parametrize("path", FILES)
def test_a_body_that_is_encoded_is_fetched_again_or_named(hub: Hub, tmp_path: Path, path: str) -> None:
    encoded = {"status": 200, "body": gzip.compress(FILES[path]), "headers": {"Content-Encoding": "gzip"}}
    hub.inject(Fault("get", path, **encoded))  # type: ignore[arg-type]
    bring(RECIPE, tmp_path / "m", hub)
    assert_right(tmp_path / "m")
    hub.inject(Fault("get", path, times=-1, **encoded))  # type: ignore[arg-type]
    error = refused(hub, tmp_path / "n")
    assert error.code == "hash_mismatch" and "gzip encoding" in error.message
    assert not (tmp_path / "n" / path).exists()


@pytest.mark.parametrize("status", [200, 203, 204, 205, 300, 302, 304, 416])
def test_an_answer_without_the_file_is_asked_for_again_or_named(hub: Hub, tmp_path: Path, status: int) -> None:
    hub.inject(Fault("get", "big*", status=status))
    bring(RECIPE, tmp_path / "m", hub)
    assert_right(tmp_path / "m")
    hub.inject(Fault("get", "big*", times=-1, status=status))
    assert refused(hub, tmp_path / "n").code == "hash_mismatch"


def test_a_length_that_is_no_number(hub: Hub, tmp_path: Path) -> None:
    hub.inject(Fault("get", "big*", status=200, body=b"x", headers={"Content-Length": "\xb2"}))
    bring(RECIPE, tmp_path / "m", hub)
    assert_right(tmp_path / "m")


def entry(**fields: object) -> dict[str, object]:
    """A file of a tree."""
    return {"type": "file", "oid": "1" * 40, "size": 5, "path": "small.json", **fields}


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ([1], "hub_endpoint"),
        ([None], "hub_endpoint"),
        ([entry(lfs="x")], "hub_endpoint"),
        ([entry(lfs={"oid": 5, "size": 5})], "hub_endpoint"),
        ([entry(size=-5)], "hub_endpoint"),
        ([entry(size=True)], "hub_endpoint"),
        ([entry(oid="x")], "hub_endpoint"),
        ([entry(size=1 << 70)], "disk_full"),
        ([entry(path="\ud800")], "path_unsafe"),
        ([entry(path="a" * 300)], "path_unsafe"),
        ([entry(path="a/" * 3000 + "b")], "path_unsafe"),
        ([entry(path="/etc/passwd")], "path_unsafe"),
        ([entry(path="C:\\x")], "path_unsafe"),
        ([entry(path=".PORT_KIT/lock")], "path_unsafe"),
        ([entry(), entry()], "target_collision"),
    ],
)
def test_a_tree_that_cannot_be_right(hub: Hub, tmp_path: Path, body: object, code: str) -> None:
    hub.inject(Fault("tree", status=200, body=json.dumps(body).encode(), headers=JSON))
    assert refused(hub, tmp_path / "m", ALL).code == code
    assert hub.gets() == []


@pytest.mark.parametrize("kind", ["revision", "tree"])
@pytest.mark.parametrize("body", [b"[" * 200_000, b'{"a":' * 100_000, b"NaN", b"\xff\xfe", b'[{"size":' + b"9" * 5000])
def test_what_is_no_json(hub: Hub, tmp_path: Path, kind: str, body: bytes) -> None:
    hub.inject(Fault(kind, status=200, body=body, headers=JSON))
    assert refused(hub, tmp_path / "m", ALL).code == "hub_endpoint"


def test_a_list_of_files_without_end(hub: Hub, tmp_path: Path) -> None:
    place = f"{hub.endpoint}/api/models/{WEIGHTS}/tree/{hub.commit(WEIGHTS)}?again=1"
    hub.inject(Fault("tree", times=-1, headers={"Link": f'<{place}>; rel="next"'}))
    error = refused(hub, tmp_path / "m", ALL)
    assert error.code == "hub_endpoint" and "does not end" in error.message
    hub.faults.clear()
    hub.inject(Fault("tree", headers={"Link": '<http://[bad>; rel="next"'}))
    assert refused(hub, tmp_path / "m", ALL).code == "hub_endpoint"


def test_tiny_answers_run_out_of_attempts(hub: Hub, tmp_path: Path) -> None:
    hub.inject(Fault("get", "big*", times=-1, cut=100))
    assert refused(hub, tmp_path / "m").code == "network"
    assert len(hub.gets("big*")) < 20
    hub.faults.clear()
    bring(RECIPE, tmp_path / "m", hub)
    assert_right(tmp_path / "m")


@pytest.mark.parametrize(
    "endpoint",
    ["foo", "ftp://x", "http://", "http://[::1", "http://h:99999", "http://u:s3cret@127.0.0.1:1", "http://ö"],
)
def test_an_endpoint_that_cannot_be_asked(hub: Hub, tmp_path: Path, endpoint: str) -> None:
    error = refused(hub, tmp_path / "m", endpoint=endpoint)
    assert error.code == "hub_endpoint" and "s3cret" not in str(error) and hub.requests == []


@pytest.mark.parametrize("token", ["hf_€s3cret", "hf_s3cret\r\nX: y", "hf_s3cret\nfoo", "hf_és3cret", "hf s3cret"])
def test_a_token_that_cannot_be_sent_is_not_shown(hub: Hub, tmp_path: Path, token: str) -> None:
    error = refused(hub, tmp_path / "m", token=token)
    assert error.code == "hub_token_invalid" and "s3cret" not in repr(error) + str(error) and hub.requests == []


def test_an_empty_token_is_none(hub: Hub, tmp_path: Path) -> None:
    bring(RECIPE, tmp_path / "m", hub, token="")
    assert not any("Authorization" in request.headers for request in hub.requests)


SECRET = "hf_" + "S3cr3tT0k3n" * 3


def command(recipe: Path, directory: Path, hub: Hub, *more: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """The download command in a process of its own, with every switch for more output."""
    arguments = [sys.executable, "-m", "port_kit", "download", str(recipe), "--output-dir", str(directory), *more]
    wordy = {"HF_DEBUG": "1", "HF_HUB_VERBOSITY": "debug"}
    environment = {**os.environ, **hub.environment, **wordy, **variables}
    return subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False, timeout=300)


def test_the_commands_print_no_token(tmp_path: Path) -> None:
    """From the environment and from the login's file, in success and failure, for people and as JSON."""
    recipe = tmp_path / "r.toml"
    recipe.write_text(
        f'name = "r"\nmodel_index = {{ _class_name = "T", _diffusers_version = "1" }}\n'
        f'[[repositories]]\nrepo_id = "{WEIGHTS}"\nfiles = [{{ pattern = "*" }}]\n'
    )
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/token").write_text(f"{SECRET}\n")
    with Hub({WEIGHTS: FILES}, token=SECRET, gated=(WEIGHTS,), cdn=True) as hub:
        done = [command(recipe, tmp_path / "a", hub, HF_TOKEN=SECRET)]
        done += [command(recipe, tmp_path / "b", hub, "--json", HF_HOME=str(tmp_path / "hf"))]
        hub.inject(Fault("head", times=-1, status=403))
        done += [command(recipe, tmp_path / "c", hub, HF_TOKEN=SECRET)]
        hub.faults.clear()
        done += [command(recipe, tmp_path / "d", hub, "--json", HF_TOKEN=SECRET[:-1] + "x")]
        hub.granted = False
        done += [command(recipe, tmp_path / "e", hub, HF_TOKEN=SECRET)]
    assert [run.returncode for run in done] == [0, 0, 1, 1, 1], done
    assert {request.headers.get("Authorization") for request in hub.requests if request.host == "cdn"} == {None}
    assert any(request.headers.get("Authorization") == f"Bearer {SECRET}" for request in hub.requests)
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path != tmp_path / "hf/token"]
    assert not any(SECRET[:20] in run.stdout + run.stderr for run in done)
    assert not any(SECRET[:20].encode() in path.read_bytes() for path in files)


def test_a_hash_that_the_recipe_states_counts_for_small_files_too(hub: Hub, tmp_path: Path) -> None:
    """The Hub states a git hash for them; the recipe's sha256 is checked."""

    def stating(sha256: str, pattern: str = "small.json") -> Recipe:
        return Recipe("r", (Repository(WEIGHTS, (FileRule(pattern, sha256=sha256),)),), MODEL_INDEX)

    bring(stating(hashlib.sha256(SMALL).hexdigest()), tmp_path / "m", hub)
    assert refused(hub, tmp_path / "n", stating("0" * 64)).code == "hash_mismatch"
    assert refused(hub, tmp_path / "o", stating("0" * 64, "*")).code == "target_collision"
