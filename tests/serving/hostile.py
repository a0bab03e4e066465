"""A server with API keys, a folder of LoRA files, an allowed host and a small disk, for requests meant to break it."""

from __future__ import annotations

import http.server
import io
import shlex
import socket
import struct
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from PIL import Image

from port_kit.testing.server import ApiServer
from tests.serving.helpers import EXAMPLES, PATH, download_as_written

ALICE, BOB = "alice-key", "bob-key"
GOOD = {"prompt": "rain", "num_inference_steps": "1", "seed": "1"}
LIMIT = 300.0
#: Options of the server in these tests.
UPLOAD_SECONDS, DRAIN_SECONDS, MAX_UPLOAD_MB, MAX_QUEUE, DISK_KB = 3, 4, 2, 6, 4096
IDLE_SECONDS = 3


def png(width: int, height: int) -> bytes:
    """Return a black PNG, of any size in a few kB."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    row, packer = b"\0" * ((width + 7) // 8 + 1), zlib.compressobj(9)
    packed = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def small_png() -> bytes:
    """Return a picture that Ovi takes as its first frame."""
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), (200, 80, 40)).save(buffer, "PNG")
    return buffer.getvalue()


def refused(response: httpx.Response, *parts: str, status: int = 400) -> str:
    """Return the message of an error; all errors have one form."""
    assert response.status_code == status, response.text[:500]
    body = response.json()
    assert list(body) == ["error"] and list(body["error"]) == ["message", "type", "param", "code"], body
    assert body["error"]["code"] == status
    message = str(body["error"]["message"])
    assert all(part in message for part in parts), message
    return message


@dataclass
class Outside:
    """A web server that references could be fetched from.

    Attributes:
        port: on the loopback interface.
        asked: paths of all requests.
    """

    port: int = 0
    asked: list[str] = field(default_factory=list)

    @property
    def url(self) -> str:
        """Address of the server."""
        return f"http://127.0.0.1:{self.port}"


@contextmanager
def outside() -> Iterator[Outside]:
    """Run a web server with a picture, redirects, a huge file, an answer that never ends, and 404."""
    found = Outside()

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *arguments: Any) -> None:
            pass

        def do_GET(self) -> None:
            found.asked.append(self.path)
            headers: dict[str, str] = {}
            status, body = 200, small_png()
            if self.path.startswith("/to/"):
                status, body, headers = 302, b"", {"Location": self.path.removeprefix("/to/")}
            elif self.path == "/gzip":
                body, headers = zlib.compress(b"\0" * 2**20), {"Content-Encoding": "gzip"}
            elif self.path == "/huge":
                body = b"\0" * (10 * 2**20)
            elif self.path == "/none":
                status, body = 404, b"none"
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            try:
                self.wfile.write(body)
            except OSError:
                pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        found.port = server.server_port
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield found
        server.shutdown()


@dataclass
class Target:
    """The server, and a client for each API key.

    Attributes:
        disk: its folder of finished videos, on a disk of :data:`DISK_KB` of its own.
        loras: its folder of LoRA files.
        model: its model directory.
    """

    server: ApiServer
    alice: httpx.Client
    bob: httpx.Client
    disk: Path
    loras: Path
    web: Outside
    model: Path

    def sync(self, fields: dict[str, Any] | None = None, files: Any = None) -> httpx.Response:
        """Send a request for a video as the first client."""
        return self.alice.post("/v1/videos/sync", data={**GOOD, **(fields or {})}, files=files)

    def connect(self, data: bytes) -> socket.socket:
        """Send bytes over a new connection."""
        client = socket.create_connection(("127.0.0.1", self.server.port), 10)
        client.settimeout(LIMIT)
        try:
            client.sendall(data)
        except ConnectionError:  # the server may have closed it
            pass
        return client

    def submit(self, fields: dict[str, Any] | None = None, files: Any = None) -> str:
        """Start a job of the first client, and return its id."""
        response = self.alice.post("/v1/videos", data={**GOOD, **(fields or {})}, files=files)
        assert response.status_code == 200, response.text
        return str(response.json()["id"])


@contextmanager
def target(folder: Path) -> Iterator[Target]:
    """Start the server, with a disk of its own in a mount namespace of its own."""
    model, written = download_as_written("ovi", folder)
    disk, loras = folder / "disk", folder / "loras"
    disk.mkdir()
    loras.mkdir()
    with outside() as web:
        options = ["--storage", str(disk), "--api-key", ALICE, "--api-key", BOB, "--lora-root", str(loras)]
        options += ["--reference-host", f"127.0.0.1:{web.port}", "--reference-host", "localhost"]
        options += ["--upload-seconds", str(UPLOAD_SECONDS), "--drain-seconds", str(DRAIN_SECONDS)]
        options += ["--idle-seconds", str(IDLE_SECONDS)]
        options += ["--max-upload-mb", str(MAX_UPLOAD_MB), "--max-queue", str(MAX_QUEUE), "--fetch-seconds", "5"]
        script = folder / "serve.sh"
        start = f"mount -t tmpfs -o size={DISK_KB}k tmpfs {shlex.quote(str(disk))}"
        start += f' && exec sh {shlex.quote(str(EXAMPLES / "ovi" / "run_server.sh"))} "$@"'
        script.write_text(f'exec unshare -rm sh -c {shlex.quote(start)} sh "$@"\n', encoding="utf-8")
        arguments = [*options, *written]
        variables = {"OMP_NUM_THREADS": "1", "PATH": PATH, "PORT_KIT_CACHE": str(folder / "cache")}
        with ApiServer(model, *arguments, folder=folder, environment=variables, script=script) as server:
            clients = [
                httpx.Client(base_url=server.url, headers={"Authorization": f"Bearer {key}"}, timeout=LIMIT)
                for key in (ALICE, BOB)
            ]
            seen = Path(f"/proc/{server.pid}/root") / disk.relative_to("/")
            yield Target(server, *clients, seen, loras, web, model)
