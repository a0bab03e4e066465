"""A server that lies at a random moment in a random way: the result is always the right bytes, or an error.

``PORT_KIT_LYING_RUNS=1000`` sets the number of runs, ``PORT_KIT_LYING_SEED`` the first one's seed.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import re
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from port_kit.download import FileRule, Policy, Recipe, Repository, convert_file, download
from port_kit.errors import PortKitError
from tests.download.helpers import MODEL_INDEX, WEIGHTS, noise

RUNS = int(os.environ.get("PORT_KIT_LYING_RUNS", "40"))
SEED = int(os.environ.get("PORT_KIT_LYING_SEED", "0"))
COMMIT = "1" * 40
LIES = (
    *("range_begins_elsewhere", "range_ends_later", "range_ends_later_and_late", "range_ends_earlier", "no_range"),
    *("truncated", "empty", "surplus", "other_bytes", "another_segment", "length_and_range_differ", "multipart"),
    *("whole_file", "whole_file_late", "whole_file_other_bytes", "half_of_the_whole_file"),
    *("error", "refusal", "etag", "reset"),
)


class LyingHub(ThreadingHTTPServer):
    """A Hub of one repository; ``lie`` says with which probability an answer to a GET is one of :data:`LIES`."""

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.dice, self.lie, self.told = files, random.Random(), 0.0, 0

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients hang up on liars."""


class Handler(BaseHTTPRequestHandler):
    """Answers of the Hub, true ones and others."""

    protocol_version = "HTTP/1.1"
    server: LyingHub

    def log_message(self, format: str, *args: object) -> None:
        """No output."""

    def do_HEAD(self) -> None:
        self.send(200, b"")

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if "/revision/" in path:
            self.send(200, json.dumps({"sha": COMMIT}).encode())
        elif "/tree/" in path:
            self.send(200, json.dumps([entry(*item) for item in self.server.files.items()]).encode())
        else:
            self.send_file(self.server.files[path.rpartition("/")[2]])

    def send(self, status: int, body: bytes, *, length: int | None = None, late: bytes = b"", **headers: str) -> None:
        """Answer; ``late`` comes a moment after the rest, and without a length the body ends with the connection."""
        self.send_response(status)
        self.send_header("X-Repo-Commit", COMMIT)
        stated = len(body) + len(late) if length is None else length
        for name, value in {"Content-Length": str(stated), **headers}.items():
            if value:
                self.send_header(name.replace("_", "-"), value)
        self.close_connection = self.close_connection or stated != len(body) + len(late) or bool(headers)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)
            if late:
                self.wfile.flush()
                time.sleep(0.15)
                self.wfile.write(late)

    def send_file(self, content: bytes) -> None:
        asked, dice = re.match(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")), self.server.dice
        start, end = (int(asked[1]), min(int(asked[2]) + 1, len(content))) if asked else (0, len(content))
        lie = dice.choice(LIES) if dice.random() < self.server.lie else ""
        self.server.told += bool(lie)
        other = bytes(value ^ 0x55 for value in content[: 1 << 15]) * (len(content) // (1 << 15) + 1)
        part, status = content[start:end], 206 if asked else 200
        said = {"Content_Range": f"bytes {start}-{end - 1}/{len(content)}"} if asked else {}
        middle, more = dice.randint(start, end), min(len(content), end + dice.randint(1, 1 << 17))
        further = {"Content_Range": f"bytes {start}-{more - 1}/{len(content)}"} if asked else {}
        if lie == "range_begins_elsewhere":
            self.send(status, content[middle:end], Content_Range=f"bytes {middle}-{end - 1}/{len(content)}")
        elif lie == "range_ends_later":
            self.send(status, content[start:more], **further)
        elif lie == "range_ends_later_and_late":
            self.send(status, part, late=other[end:more], **further)
        elif lie == "range_ends_earlier":
            middle = max(middle, start + 1)
            self.send(status, content[start:middle], Content_Range=f"bytes {start}-{middle - 1}/{len(content)}")
        elif lie == "surplus":
            self.send(status, part, late=other[: 1 << 14], Content_Length="", **said)
        elif lie == "truncated":
            self.send(status, content[start:middle], length=end - start, **said)
        elif lie == "empty":
            self.send(status, b"", **said)
        elif lie == "other_bytes":
            self.send(status, content[start:middle] + other[middle:end], **said)
        elif lie == "another_segment":
            self.send(status, (content[end:] + content)[: end - start], **said)
        elif lie == "whole_file":
            self.send(200, content)
        elif lie == "whole_file_late":
            self.send(200, content[:end], late=other[end:])
        elif lie == "whole_file_other_bytes":
            self.send(200, content[:middle] + other[middle : len(content)])
        elif lie == "half_of_the_whole_file":
            self.send(200, content[: len(content) // 2], Content_Length="")
        elif lie == "length_and_range_differ":
            self.send(status, content[start:middle], **said)
        elif lie == "error":
            self.send(dice.choice((500, 503, 429, 408)), b"", Retry_After=dice.choice(("0", "", "soon")))
        elif lie == "refusal":
            self.send(dice.choice((204, 304, 400, 403, 404, 416)), b"")
        elif lie == "etag":
            self.send(status, part, ETag=f'"{dice.random()}"', **said)
        elif lie == "reset":
            self.close_connection = True
            self.connection.close()
        elif lie == "no_range":
            self.send(status, part)
        elif lie == "multipart":
            body = b"--x\r\nContent-Range: bytes 0-1/9\r\n\r\n" + part + b"\r\n--x--\r\n"
            self.send(206, body, Content_Type="multipart/byteranges; boundary=x")
        else:
            self.send(status, part, **said)


def entry(path: str, content: bytes) -> dict[str, object]:
    """A file of the tree."""
    digest = hashlib.sha256(content).hexdigest()
    oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    return {
        "type": "file",
        "path": path,
        "size": len(content),
        "oid": oid,
        "lfs": {"oid": digest, "size": len(content)},
    }


def checkpoint() -> bytes:
    """A checkpoint with storages of many sizes."""
    stream = io.BytesIO()
    torch.manual_seed(1)
    torch.save({f"t{index}": torch.randn(1 << index) for index in range(4, 17)}, stream)
    return stream.getvalue()


FILES = {"plain.safetensors": noise(700_001, 3), "small.bin": noise(3000, 4), "x.pth": checkpoint()}
RULES = (FileRule("plain.safetensors"), FileRule("small.bin"), FileRule("x.pth", name="y.safetensors", convert=True))


@pytest.fixture(scope="module")
def hub() -> Iterator[LyingHub]:
    """The server."""
    with LyingHub(FILES) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Return the expected content of a model directory."""
    folder = tmp_path_factory.mktemp("right")
    (folder / "x.pth").write_bytes(FILES["x.pth"])
    convert_file(folder / "x.pth", folder / "y.safetensors")
    assert len(load_file(folder / "y.safetensors")) == 13
    return {
        **{name: FILES[name] for name in ("plain.safetensors", "small.bin")},
        "y.safetensors": (folder / "y.safetensors").read_bytes(),
    }


def assert_honest(directory: Path, expected: dict[str, bytes], complete: bool) -> None:
    """Every file that has its final name is right, and the lock states its hash."""
    for name, content in expected.items():
        found = (directory / name).read_bytes() if (directory / name).exists() else None
        assert found == content or (found is None and not complete), name
    assert (directory / "model_index.json").exists() == complete
    if complete:
        stated = json.loads((directory / "port.lock").read_text())["files"]
        assert {name: item["final_sha256"] for name, item in stated.items()} == {
            name: hashlib.sha256(content).hexdigest() for name, content in expected.items()
        }


def run(hub: LyingHub, directory: Path, dice: random.Random) -> bool:
    """Download; return True if it says that the directory is complete."""
    policy = Policy(
        connect_timeout=2,
        read_timeout=1,
        attempts=dice.choice((2, 4)),
        base=0.002,
        longest=1,
        connections=dice.choice((1, 2, 4)),
        files_at_once=dice.choice((1, 3)),
        segment_size=dice.choice((1 << 16, 100_000, 1 << 18, 1 << 20)),
    )
    recipe = Recipe("r", (Repository(WEIGHTS, RULES, COMMIT),), MODEL_INDEX)
    endpoint = f"http://127.0.0.1:{hub.server_port}"
    try:
        return download(recipe, directory, endpoint=endpoint, policy=policy, use_cache=False, token=False).complete
    except PortKitError:
        return False


@pytest.mark.parametrize("block", range(8))
def test_the_result_is_right_or_an_error(hub: LyingHub, expected: dict[str, bytes], tmp_path: Path, block: int) -> None:
    completed = told = 0
    for number in range(block, RUNS, 8):
        dice, directory = random.Random(SEED + number), tmp_path / str(number)
        hub.dice.seed(SEED + number)
        for lie in (dice.choice((0.05, 0.2, 0.5, 1.0)), dice.choice((0.05, 0.3)), 0.0):
            hub.lie, before = lie, hub.told
            complete = run(hub, directory, dice)
            told += hub.told - before
            assert_honest(directory, expected, complete)
            completed += complete
        assert complete, f"seed {SEED + number}: the last run met no lie"
    assert told and completed or not RUNS
