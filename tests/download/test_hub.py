"""Servers, mirrors and proxies as they are: every valid form is read, and whatever they say is shown escaped."""

from __future__ import annotations

import base64
import io
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path

import pytest

from port_kit.download import FileRule, Policy, Recipe, Repository
from port_kit.download.http import HttpClient
from port_kit.download.hub import HubClient
from port_kit.download.progress import BarProgress, LineProgress
from port_kit.download.urls import follow_location, origin_of
from port_kit.errors import DownloadError, PortKitError
from port_kit.escape import redacted
from port_kit.testing.hub import Fault, Hub
from tests.download.helpers import IMPATIENT, MODEL_INDEX, WEIGHTS, bring, noise

BIG = noise(2 << 20)
ALL = Recipe("r", (Repository(WEIGHTS, (FileRule("*"),)),), MODEL_INDEX)
JSON = {"Content-Type": "application/json"}


@pytest.fixture
def hub() -> Iterator[Hub]:
    """A Hub whose list of files has three pages."""
    with Hub({WEIGHTS: {f"f{number}.bin": b"%d" % number for number in range(5)}}, page_size=2) as running:
        yield running


def refused(hub: Hub, directory: Path, recipe: Recipe = ALL, **options: object) -> DownloadError:
    """Return the error of a run that must fail."""
    with pytest.raises(DownloadError) as caught:
        bring(recipe, directory, hub, **options)
    assert not (directory / "model_index.json").exists() and caught.value.hint
    return caught.value


@pytest.mark.parametrize(
    "form",
    [
        '<{url}>; rel="next"',
        "<{url}>; rel=next",
        "<{url}> ; rel=next",
        '<{url}>; title="a, <b>; rel=prev"; rel="next"',
        '<{url}>;REL="last Next"',
        '<https://cdn.example/x,y>; rel="preconnect", <{url}>; rel="next"',
        '<{path}>; rel="next"',
        '<{url}>; rel="next"; rel="prev"',
        "<{url}>;title=x;rel=next,<https://cdn.example/>;rel=prev",
    ],
)
def test_the_next_page_is_read_in_every_valid_form(hub: Hub, tmp_path: Path, form: str) -> None:
    commit = hub.commit(WEIGHTS)
    for page, kind in ((2, "tree"), (4, "tree2")):
        path = f"/api/models/{WEIGHTS}/tree/{commit}?cursor={page}"
        hub.inject(Fault(kind, headers={"Link": form.format(url=hub.endpoint + path, path=path)}))
    bring(ALL, tmp_path / "m", hub)
    assert len(list((tmp_path / "m").glob("*.bin"))) == 5


@pytest.mark.parametrize(
    "form", ['<{url}>; rel="prev"', '<{url}>; rel="nextish"', '<{url}>; x="rel=next"', "<{url}>", "", "rel=next"]
)
def test_other_links_are_no_next_page(form: str) -> None:
    from port_kit.download.hub import _next_link

    assert _next_link(form.format(url="https://h/x")) is None


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("https://huggingface.co", "https://HuggingFace.co:443/x", True),
        ("http://h", "http://h:80", True),
        ("https://h", "http://h", False),
        ("https://h", "https://h:80", False),
        ("https://h", "https://h.evil", False),
        ("https://h", "https://h@evil", False),
    ],
)
def test_an_origin_is_scheme_host_and_port(first: str, second: str, same: bool) -> None:
    assert (origin_of(first) == origin_of(second)) is same


@pytest.mark.parametrize(
    "entries",
    [
        [{"type": "directory", "path": "sub", "oid": "0" * 40, "size": 0}],
        [{"path": "a.bin", "oid": "1" * 40, "size": 1}],
        [{"type": "submodule", "path": "a.bin", "oid": "1" * 40, "size": 1}],
    ],
)
def test_a_list_that_is_not_complete_is_refused(hub: Hub, tmp_path: Path, entries: list[object]) -> None:
    file = {"type": "file", "path": "f0.bin", "oid": "1" * 40, "size": 1}
    hub.inject(Fault("tree", status=200, body=json.dumps([file, *entries]).encode(), headers=JSON))
    assert refused(hub, tmp_path / "m").code == "hub_endpoint" and hub.gets() == []


def test_folders_whose_files_are_listed_are_complete(hub: Hub, tmp_path: Path) -> None:
    hub.push(WEIGHTS, {"a/b/c.bin": b"1"})
    file = {"type": "file", "path": "a/b/c.bin", "oid": hub.file(WEIGHTS, "a/b/c.bin").git_sha1, "size": 1}
    file["lfs"] = {"oid": hub.file(WEIGHTS, "a/b/c.bin").sha256, "size": 1}
    folders = [{"type": "directory", "path": path, "oid": "0" * 40} for path in ("a", "a/b")]
    hub.inject(Fault("tree", status=200, body=json.dumps([*folders, file]).encode(), headers=JSON))
    bring(ALL, tmp_path / "m", hub)
    assert (tmp_path / "m/a/b/c.bin").read_bytes() == b"1"


def test_pages_without_files_end(hub: Hub, tmp_path: Path) -> None:
    for number in range(100):
        place = f"{hub.endpoint}/api/models/{WEIGHTS}/tree/{hub.commit(WEIGHTS)}?cursor=0&n={number}"
        hub.inject(Fault("tree", status=200, body=b"[]", headers={**JSON, "Link": f'<{place}>; rel="next"'}))
    assert refused(hub, tmp_path / "m").code == "hub_endpoint" and len(hub.requests) < 10


@pytest.mark.parametrize(
    "fault",
    [
        Fault("get", times=-1, status=206, headers={"Content-Range": "bytes 0-1048575/2097152"}),
        Fault("get", times=-1, status=200, no_length=True, ignore_range=True, cut=0),
        Fault("get", times=-1, no_length=True, cut=1000),
        Fault("get", times=-1, ignore_range=True, cut=5000),
    ],
)
def test_answers_without_content_end_after_some_attempts(tmp_path: Path, fault: Fault) -> None:
    with Hub({WEIGHTS: {"f": BIG}}) as hub:
        hub.inject(fault)
        assert refused(hub, tmp_path / "m").code in ("network", "hash_mismatch")
        assert len(hub.gets()) < 30


def test_a_server_that_sends_single_bytes_runs_out_of_attempts(tmp_path: Path) -> None:
    """A server that sends one byte at a time never runs into the read timeout."""
    with socket.create_server(("127.0.0.1", 0)) as listener, Hub({WEIGHTS: {"f": BIG}}) as hub:
        accepted: list[socket.socket] = []

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                    accepted.append(connection)
                    connection.recv(4000)
                    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(BIG))
                    while True:
                        connection.sendall(b"x")
                        time.sleep(0.05)
                except OSError:
                    if listener.fileno() < 0:
                        return

        threading.Thread(target=serve, daemon=True).start()
        place = f"http://127.0.0.1:{listener.getsockname()[1]}/f"
        hub.inject(Fault("get", times=-1, status=302, headers={"Location": place}))
        policy = Policy(attempts=2, read_timeout=0.4, base=0.01, connections=1)
        assert refused(hub, tmp_path / "m", policy=policy).code == "network"
        assert len(accepted) == policy.attempts


def test_a_short_range_is_progress(tmp_path: Path) -> None:
    """HTTP allows a server to send less than it was asked for."""
    with Hub({WEIGHTS: {"f": BIG}}, longest_range=10_000) as hub:
        bring(ALL, tmp_path / "m", hub, policy=Policy(segment_size=1 << 20, attempts=2, base=5))
        assert (tmp_path / "m/f").read_bytes() == BIG and len(hub.gets()) > 200


@pytest.mark.parametrize("location", ["http://[bad/", "http://host:99999/x", "javascript:1", "//", "\x00"])
@pytest.mark.parametrize("kind", ["head", "revision", "tree"])
def test_a_redirect_that_is_no_url_is_named(hub: Hub, tmp_path: Path, kind: str, location: str) -> None:
    hub.inject(Fault(kind, times=-1, status=307, headers={"Location": location}))
    assert refused(hub, tmp_path / "m").code in ("network", "hub_endpoint")


def test_a_redirect_in_utf8_is_followed() -> None:
    raw = "/ö".encode().decode("latin-1")
    assert follow_location("https://h/x", raw) == "https://h/%C3%B6"


@pytest.mark.parametrize("skew", [3600, -3600])
def test_a_date_to_come_back_at_is_by_the_servers_clock(hub: Hub, tmp_path: Path, skew: int) -> None:
    now = time.time() + skew
    headers = {"Date": formatdate(now, usegmt=True), "Retry-After": formatdate(now + 2, usegmt=True)}
    hub.inject(Fault("get", "f0.bin", status=503, headers=headers))
    assert bring(ALL, tmp_path / "m", hub, policy=Policy(longest=60)).complete  # by this machine's clock: an hour
    assert len(hub.gets("f0.bin")) == 2


@pytest.mark.parametrize(
    ("kind", "status", "code"),
    [
        ("get", 403, "hub_refused"),
        ("get", 451, "hub_refused"),
        ("tree", 404, "hub_repo_missing"),
        ("get", 401, "hub_token_missing"),
        ("revision", 503, "network"),
        ("get", 429, "network"),
    ],
)
@pytest.mark.parametrize("form", ["header", "body"])
def test_every_refusal_has_the_hubs_own_reason(
    hub: Hub, tmp_path: Path, kind: str, status: int, code: str, form: str
) -> None:
    reason = "this repository\x1b[2J was taken down by its owner"
    body = json.dumps({"error": reason}).encode() if form == "body" else b""
    headers = {"X-Error-Message": reason} if form == "header" else {}
    hub.inject(Fault(kind, times=-1, status=status, body=body, headers=headers))
    error = refused(hub, tmp_path / "m")
    assert error.code == code and r"this repository\x1b[2J was taken down" in error.message


# --- proxies ----------------------------------------------------------------------------------------------------------


class Recorder:
    """A proxy that records requests and rejects them."""

    def __enter__(self) -> Recorder:
        self.said, self._listener = b"", socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._serve, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()

    @property
    def port(self) -> int:
        return int(self._listener.getsockname()[1])

    def _serve(self) -> None:
        while self._listener.fileno() >= 0:
            try:
                connection, _ = self._listener.accept()
                self.said += connection.recv(4000)
                connection.sendall(b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n")
                connection.close()
            except OSError:
                return


@pytest.mark.parametrize(
    ("variable", "proxy", "endpoint", "sent"),
    [
        ("http_proxy", "http://us%40er:p%3Aw%23@127.0.0.1:{port}", "http://hub.invalid", "us@er:p:w#"),
        ("https_proxy", "http://us%40er:p%3Aw%23@127.0.0.1:{port}", "https://hub.invalid", "us@er:p:w#"),
        ("all_proxy", "http://user:secret@127.0.0.1:{port}", "http://hub.invalid", "user:secret"),
        ("http_proxy", "user:secret@127.0.0.1:{port}", "http://hub.invalid", "user:secret"),
        ("https_proxy", "https://user:secret@127.0.0.1:{port}", "https://hub.invalid", ""),
        ("http_proxy", "https://user:secret@127.0.0.1:{port}", "http://hub.invalid", ""),
        ("https_proxy", "socks5h://user:secret@127.0.0.1:{port}", "https://hub.invalid", ""),
        ("all_proxy", "socks5://user:secret@127.0.0.1:{port}", "https://hub.invalid", ""),
    ],
)
def test_a_proxy_gets_its_password_as_it_is_meant_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, proxy: str, endpoint: str, sent: str
) -> None:
    monkeypatch.setenv("NO_PROXY", "")
    monkeypatch.delenv("no_proxy", raising=False)
    with Recorder() as recorder, Hub({WEIGHTS: {"f": b"1"}}) as hub:
        monkeypatch.setenv(variable, proxy.format(port=recorder.port))
        error = refused(hub, tmp_path / "m", endpoint=endpoint, policy=Policy(attempts=1, connect_timeout=2))
    found = re.search(rb"Proxy-Authorization: Basic (\S+)", recorder.said)
    assert (base64.b64decode(found[1]).decode() if found else "") == sent
    assert error.code == ("network" if sent and "https:" in endpoint else "proxy")
    assert "secret" not in str(error) and "p%3Aw" not in str(error)


# --- output -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [LineProgress, BarProgress])
def test_progress_shows_names_escaped(capsys: pytest.CaptureFixture[str], make: type[LineProgress]) -> None:
    progress = make()
    progress.begin("fetching \x1b]0;x\x07", 10)
    progress.note("a note \x9b31m of a \u202e server")
    progress.file_done("a\x1b[2J.bin", 5)
    progress.end()
    shown = capsys.readouterr().err
    assert not any(sign in shown.replace("\x1b[A", "") for sign in ("\x1b]", "\x1b[2", "\x9b", "\u202e", "\x07"))


def test_errors_are_escaped_and_urls_redacted() -> None:
    error = PortKitError("it says \x1b[2J\u202e", code="network", hint="a")
    assert error.message == r"it says \x1b[2J\u202e" and "\x1b" not in str(error)
    assert redacted("see https://u:p@h/x?token=t and ssh://git@h:22/y") == "see https://h/x and ssh://h:22/y"
    assert redacted("is it so? no: a@b") == "is it so? no: a@b"


def test_all_that_a_server_says_is_escaped(tmp_path: Path) -> None:
    stream = io.StringIO()
    evil = "\x1b]0;owned\x07"
    with Hub({WEIGHTS: {"f": BIG}}) as hub:
        hub.inject(Fault("get", times=1, flip=5), Fault("get", times=-1, headers={"Content-Encoding": evil}))
        error = refused(hub, tmp_path / "m", policy=IMPATIENT, progress=LineProgress(stream))
    assert "\x1b" not in stream.getvalue() + str(error) and r"\x1b]0;owned" in str(error)


@pytest.mark.parametrize(
    ("weight_map", "code"),
    [
        ([], "model_incomplete"),
        ({"w": ["x"]}, "model_incomplete"),
        ({"w": 3}, "model_incomplete"),
        ({"w": "../x"}, "model_incomplete"),
        ({"w": "/etc/passwd"}, "model_incomplete"),
        ({"w": "shards/absent"}, "model_incomplete"),
        ({"w": "shards/x.safetensors"}, ""),
    ],
)
def test_an_index_of_any_shape_is_right_or_named(tmp_path: Path, weight_map: object, code: str) -> None:
    index = json.dumps({"weight_map": weight_map}).encode()
    with Hub({WEIGHTS: {"model.safetensors.index.json": index, "shards/x.safetensors": b"x"}}) as hub:
        if code:
            assert refused(hub, tmp_path / "m").code == code
        else:
            assert bring(ALL, tmp_path / "m", hub).complete


def test_a_token_goes_to_the_endpoints_origin(hub: Hub) -> None:
    client = HubClient(HttpClient(Policy()), endpoint="https://hub.example/mirror", token="hf_x")
    for url, sent in (
        ("https://hub.example:443/x", True),
        ("http://hub.example/x", False),
        ("https://cdn.example/x", False),
        ("https://hub.example:8443/x", False),
    ):
        assert ("authorization" in client.headers_for(url)) is sent
