"""Connections that a server must survive: endless and slow bodies, slow heads, clients that never read, no HTTP."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator

import httpx
import psutil
import pytest

from tests.helpers import wait_until
from tests.serving.hostile import ALICE, IDLE_SECONDS, LIMIT, UPLOAD_SECONDS, Target, refused

#: Seconds that a busy machine may need beyond a limit.
SLACK = 20


def test_a_body_is_bounded_while_it_arrives(target: Target) -> None:
    def endless() -> Iterator[bytes]:
        yield b'--b\r\nContent-Disposition: form-data; name="whatever"; filename="a"\r\n\r\n'
        while True:
            yield b"\0" * 2**16

    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    # a client may see that the connection is closed before it reads the answer
    try:
        refused(target.alice.post("/v1/videos/sync", content=endless(), headers=headers), "--max-upload-mb")
    except (httpx.WriteError, httpx.RemoteProtocolError):
        pass
    declared = {**headers, "Content-Length": str(10**9)}
    with socket.create_connection(("127.0.0.1", target.server.port), 10) as client:
        client.settimeout(LIMIT)
        lines = [f"{name}: {value}" for name, value in {**declared, "Authorization": f"Bearer {ALICE}"}.items()]
        client.sendall(("POST /v1/videos/sync HTTP/1.1\r\nHost: x\r\n" + "\r\n".join(lines) + "\r\n\r\n").encode())
        assert client.recv(100).startswith(b"HTTP/1.1 400")


HEAD = f"POST /v1/videos/sync HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {ALICE}\r\n".encode()
FORM = HEAD + b"Content-Type: multipart/form-data; boundary=b\r\n"


def test_a_slow_upload_ends(target: Target) -> None:
    started = time.monotonic()
    with target.connect(FORM + b"Content-Length: 1000\r\n\r\n--b") as client:
        assert client.recv(100).startswith(b"HTTP/1.1 408")
    assert UPLOAD_SECONDS - 1 < time.monotonic() - started < UPLOAD_SECONDS + SLACK


def test_a_slow_head_ends(target: Target) -> None:
    started = time.monotonic()
    with target.connect(HEAD) as client, target.connect(b"") as silent:
        assert (closed(client), closed(silent)) == (True, True)
    assert UPLOAD_SECONDS - 1 < time.monotonic() - started < UPLOAD_SECONDS + SLACK


def closed(client: socket.socket) -> bool:
    """Wait until the server closes a connection; return True if it sent nothing."""
    try:
        return client.recv(100) == b""
    except ConnectionError:
        return True


def test_a_client_that_never_reads_is_left(target: Target, first: bytes) -> None:
    job = target.submit()
    wait_until(lambda: target.alice.get(f"/v1/videos/{job}").json()["status"] == "completed", LIMIT, pause=0.2)
    line = f"GET /v1/videos/{job}/content HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {ALICE}\r\n\r\n".encode()
    with target.connect(line * 200) as client:
        own = client.getsockname()[1]

        def is_open() -> bool:
            open_ones = psutil.Process(target.server.pid).net_connections()
            return any(found.raddr and found.raddr.port == own for found in open_ones)

        wait_until(is_open)  # a busy server accepts late
        started = time.monotonic()
        wait_until(lambda: not is_open(), IDLE_SECONDS + SLACK, pause=0.2)
        assert time.monotonic() - started > IDLE_SECONDS / 2
    assert target.alice.delete(f"/v1/videos/{job}").status_code == 200


@pytest.mark.parametrize(
    "data",
    [
        HEAD + b"X: " + b"a" * 2**20 + b"\r\n\r\n",
        HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /v1/videos HTTP/1.1\r\n\r\n",
        HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef",
        HEAD + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n",
        HEAD + b"Content-Length: \xb2\r\n\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffffff\r\n",
        b"GET /v1/videos HTTP/9.9\r\n\r\n",
        b"\x16\x03\x01\x02\0",
    ],
    ids=["large head", "two framings", "two lengths", "long length", "superscript", "chunk", "version", "tls"],
)
def test_what_is_no_http_gets_the_form_of_errors_or_nothing(target: Target, data: bytes) -> None:
    with target.connect(data) as client:
        try:
            head, _, body = client.recv(4096).partition(b"\r\n\r\n")
        except ConnectionResetError:
            return
        assert head.startswith(b"HTTP/1.1 400") and json.loads(body)["error"]["code"] == 400
        assert closed(client)


@pytest.mark.parametrize("charset", ["unicode_escape", "utf-16", "hex", "idna", "punycode", "latin-1"])
def test_texts_are_utf_8(target: Target, charset: str) -> None:
    body = b'--b\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na_\\ud800\r\n--b--\r\n'
    for kind in ("multipart/form-data; boundary=b", "application/x-www-form-urlencoded"):
        headers = {"Content-Type": f"{kind}; charset={charset}"}
        for extra in ({}, {"Expect": "100-continue"}):
            answer = target.alice.post("/v1/videos", content=body, headers={**headers, **extra})
            refused(answer, "[input_type]", charset)


@pytest.mark.parametrize("end", [b"", b"\r\n--b", b"\r\n--b-", b"--b--"], ids=["none", "part", "dash", "no line"])
def test_a_form_without_its_end_is_refused(target: Target, end: bytes) -> None:
    """The parser would leave out its last field."""
    fields = [(b"prompt", b"rain"), (b"num_inference_steps", b"0")]
    parts = [b'--b\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s' % field for field in fields]
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    answer = target.alice.post("/v1/videos/sync", content=b"\r\n".join(parts) + end, headers=headers)
    refused(answer, "it has no end")
