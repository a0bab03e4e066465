"""A Hub on the loopback interface, for tests and measurements, with faults on demand.

It implements the requests of huggingface_hub and :mod:`port_kit.download`: revision, paged tree, paths, HEAD and GET of
files with ranges, LFS headers, gated and private repositories, tokens, redirects to another host. Files are bytes or
paths::

    with Hub({"org/model": {"a/model.safetensors": b"...", "vae.pth": Path("vae.pth")}}) as hub:
        hub.inject(Fault("get", path="vae.pth", cut=1000))       # the next GET of it breaks after 1000 bytes
        subprocess.run([...], env={**os.environ, **hub.environment})
        assert [request.path for request in hub.requests if request.method == "GET"]
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import socket
import struct
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from port_kit.testing.hub_tree import Content, StoredFile, list_tree, paths_info, store

_PIECE = 1 << 20


@dataclass
class Fault:
    """A fault that is injected into the next matching requests.

    Attributes:
        kind: ``revision``, ``tree``, ``tree2`` (pages after the first), ``head`` or ``get``.
        path: shell pattern over the file's path (or the repository id for the API).
        times: how many requests it hits; -1 for all.
        status: answer with this status (and ``headers``, ``body``) instead.
        headers: added to the answer; an empty value removes a header.
        body: the body if ``status`` is given.
        stall: seconds of silence before the answer.
        stall_at: byte of the body before which ``stall`` happens instead.
        cut: close the connection after so many bytes of the body.
        reset: with ``cut``: by TCP reset.
        flip: invert the byte of the file at this offset, if the answer contains it.
        ignore_range: answer 200 with the complete file.
        shift_range: serve this many bytes further than ``Content-Range`` should say, and say so.
        no_length: send no Content-Length; the body ends with the connection.
        host: only requests to this host, ``hub`` or ``cdn``.
        skip: so many matching requests go well before.
    """

    kind: str
    path: str = "*"
    times: int = 1
    status: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    stall: float = 0.0
    stall_at: int = 0
    cut: int | None = None
    reset: bool = False
    flip: int | None = None
    ignore_range: bool = False
    shift_range: int = 0
    no_length: bool = False
    host: str = ""
    skip: int = 0


@dataclass
class Request:
    """One request as the server saw it.

    ``sent`` counts the body's bytes, ``host`` is ``hub`` or ``cdn``, names of headers are in title case.
    """

    method: str
    path: str
    kind: str
    headers: dict[str, str]
    host: str = "hub"
    status: int = 0
    sent: int = 0


class Hub:
    """The server; a context manager. Repositories start with one commit on ``main``.

    Args:
        repositories: ``{repo_id: {path: bytes or Path}}``.
        token: the only token that is accepted; without it every token is.
        gated: repositories whose files need a token that was granted access (``granted``).
        private: repositories that require the token.
        granted: whether ``token`` may read gated repositories.
        bytes_per_second: limit of each connection.
        cdn: LFS files are redirected to another host (``localhost`` instead of ``127.0.0.1``).
        page_size: entries a page of the tree.
        xet: ``{path: Xet hash}`` of files that are announced to lie in Xet storage as well.
        longest_range: so many bytes of a range are sent at most.
        port: TCP port; 0 selects a free one.
    """

    def __init__(
        self,
        repositories: Mapping[str, Mapping[str, Content]],
        *,
        token: str | None = None,
        gated: tuple[str, ...] = (),
        private: tuple[str, ...] = (),
        granted: bool = True,
        bytes_per_second: int | None = None,
        cdn: bool = False,
        page_size: int = 1000,
        xet: Mapping[str, str] | None = None,
        longest_range: int = 1 << 62,
        port: int = 0,
    ) -> None:
        self.token, self.gated, self.private, self.granted = token, set(gated), set(private), granted
        self.bytes_per_second, self.cdn, self.page_size = bytes_per_second, cdn, page_size
        self.xet, self.longest_range = dict(xet or {}), longest_range
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self._lock = threading.Lock()
        self._commits: dict[tuple[str, str], dict[str, StoredFile]] = {}
        self._branches: dict[tuple[str, str], str] = {}
        for repo_id, files in repositories.items():
            self.push(repo_id, files)
        self._server = _Server(("127.0.0.1", port), _Handler)
        self._server.hub = self

    @property
    def endpoint(self) -> str:
        """The base URL, for ``HF_ENDPOINT``."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def cdn_host(self) -> str:
        """The same server under another host name."""
        return f"localhost:{self._server.server_address[1]}"

    @property
    def environment(self) -> dict[str, str]:
        """Return environment variables that direct a child process to this Hub only."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "NO_PROXY": "127.0.0.1,localhost",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }

    def push(self, repo_id: str, files: Mapping[str, Content], *, branch: str = "main") -> str:
        """Make a commit with exactly these files, move the branch to it, and return its 40 hex digits."""
        stored = {path: store(path, content) for path, content in sorted(files.items())}
        tree = "".join(f"{file.path}\0{file.etag}\n" for file in stored.values())
        commit = hashlib.sha1(f"{repo_id}\n{tree}".encode()).hexdigest()
        self._commits[repo_id, commit] = stored
        self._branches[repo_id, branch] = commit
        return commit

    def commit(self, repo_id: str, branch: str = "main") -> str:
        """Return the commit that a branch points to."""
        return self._branches[repo_id, branch]

    def file(self, repo_id: str, path: str) -> StoredFile:
        """Return a file of ``main``."""
        return self._commits[repo_id, self.commit(repo_id)][path]

    def inject(self, *faults: Fault) -> None:
        """Let these go wrong from now on; several that match the same request are used up one after another."""
        self.faults += faults

    def gets(self, path: str = "*") -> list[Request]:
        """Return the GET requests of files whose path in the repository matches."""
        return [request for request in self.requests if request.kind == "get" and _matches(request.path, path)]

    def start(self) -> Hub:
        """Start serving in a thread."""
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def stop(self) -> None:
        """Stop serving and close the port."""
        self._server.shutdown()
        self._server.server_close()

    def __enter__(self) -> Hub:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def find(self, repo_id: str, revision: str) -> tuple[str, dict[str, StoredFile]] | None:
        """Return commit and files of a branch or commit."""
        commit = self._branches.get((repo_id, revision), revision)
        files = self._commits.get((repo_id, commit))
        return None if files is None else (commit, files)

    def knows(self, repo_id: str) -> bool:
        """Return True if the repository exists."""
        return any(repo_id == known for known, _ in self._branches)

    def take_fault(self, kind: str, path: str, host: str = "hub") -> Fault | None:
        """Return the first fault that matches and count it down."""
        with self._lock:
            for fault in self.faults:
                meant = fault.kind == kind and fault.host in ("", host)
                if meant and fnmatch.fnmatch(path, fault.path) and fault.times != 0:
                    if fault.skip:
                        fault.skip -= 1
                        continue
                    fault.times -= fault.times > 0
                    return fault
        return None


def _matches(url_path: str, pattern: str) -> bool:
    return fnmatch.fnmatch(url_path.partition("/resolve/")[2].partition("/")[2], pattern)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    hub: Hub

    def handle_error(self, request: object, client_address: object) -> None:
        """Print no traceback for killed clients: tests kill them on purpose."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def log_message(self, format: str, *args: object) -> None:
        """Requests are kept in ``hub.requests`` instead of printed."""

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._form = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
        self._answer()

    def _answer(self) -> None:
        hub, url = self.server.hub, urlsplit(self.path)
        self._hub, parts = hub, unquote(url.path).strip("/").split("/")
        cdn = self.headers.get("Host", "").startswith("localhost")
        headers = {name.title(): value for name, value in self.headers.items()}
        self._log = Request(self.command, unquote(url.path), "other", headers, "cdn" if cdn else "hub")
        hub.requests.append(self._log)
        if parts[:2] == ["api", "models"] and len(parts) >= 4:
            self._answer_api("/".join(parts[2:4]), parts[4:], parse_qs(url.query))
        elif len(parts) >= 5 and parts[2] == "resolve":
            self._answer_file("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        else:
            self._refuse(404, "", "no such place")

    def _answer_api(self, repo_id: str, rest: list[str], query: dict[str, list[str]]) -> None:
        what = rest[0] if rest else "revision"
        page = int(query.get("cursor", ["0"])[0])
        self._log.kind = "tree2" if what == "tree" and page else what
        fault = self._hub.take_fault(self._log.kind, repo_id)
        if self._is_faulty(fault) or not self._may_see(repo_id):
            return
        found = self._hub.find(repo_id, rest[1] if len(rest) > 1 else "main")
        if found is None:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {rest[1:]}")
            return
        commit, files = found
        if what == "tree":
            recursive = query.get("recursive", ["false"])[0] == "true"
            folder = "/".join(rest[2:])
            entries = list_tree(files, self._hub.xet, folder, recursive=recursive)
            if folder and not entries:
                self._refuse(404, "EntryNotFound", f"{folder} does not exist")
                return
            self._send_tree(repo_id, commit, entries, page, fault)
        elif what == "paths-info" and self.command == "POST":
            entries = paths_info(files, self._hub.xet, self._form.get("paths", []))
            self._send(200, json.dumps(entries).encode(), {"Content-Type": "application/json"}, fault)
        else:
            siblings = [{"rfilename": path} for path in files]
            body = {"id": repo_id, "sha": commit, "siblings": siblings, "gated": repo_id in self._hub.gated}
            self._send(200, json.dumps(body).encode(), {"Content-Type": "application/json"}, fault)

    def _send_tree(
        self, repo_id: str, commit: str, entries: list[dict[str, Any]], page: int, fault: Fault | None
    ) -> None:
        end = page + self._hub.page_size
        headers = {"Content-Type": "application/json"}
        if end < len(entries):
            base = f"{self._hub.endpoint}/api/models/{repo_id}/tree/{commit}"
            headers["Link"] = f'<{base}?recursive=true&expand=false&cursor={end}>; rel="next"'
        self._send(200, json.dumps(entries[page:end]).encode(), headers, fault)

    def _answer_file(self, repo_id: str, revision: str, path: str) -> None:
        self._log.kind = self.command.lower()
        fault = self._hub.take_fault(self._log.kind, path, self._log.host)
        if self._is_faulty(fault):
            return
        is_cdn = self._log.host == "cdn"
        if not is_cdn and not (self._may_see(repo_id) and self._may_read(repo_id)):
            return
        found = self._hub.find(repo_id, revision)
        if found is None:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return
        file = found[1].get(path)
        if file is None:
            self._refuse(404, "EntryNotFound", f"{path} does not exist", {"X-Repo-Commit": found[0]})
            return
        headers = {"X-Repo-Commit": found[0], "ETag": f'"{file.etag}"', "Accept-Ranges": "bytes"}
        if file.sha256:
            headers |= {"X-Linked-Size": str(file.size), "X-Linked-Etag": f'"{file.sha256}"'}
        if path in self._hub.xet and not is_cdn:
            token = f"{self._hub.endpoint}/api/models/{repo_id}/xet-read-token/{found[0]}"
            headers |= {"X-Xet-Hash": self._hub.xet[path], "Link": f'<{token}>; rel="xet-auth"'}
        if self._hub.cdn and file.sha256 and not is_cdn:
            location = f"http://{self._hub.cdn_host}{self.path}"
            self._send(302, b"", {**headers, "Location": location}, fault)
        else:
            self._send_file(file, headers, fault)

    def _may_see(self, repo_id: str) -> bool:
        sent = self.headers.get("Authorization", "")
        if self._hub.token and sent and sent != f"Bearer {self._hub.token}":
            self._refuse(401, "", "Invalid credentials in Authorization header")
        elif not self._hub.knows(repo_id) or (repo_id in self._hub.private and not sent):
            self._refuse(404 if sent else 401, "RepoNotFound", "Repository not found")
        else:
            return True
        return False

    def _may_read(self, repo_id: str) -> bool:
        if repo_id not in self._hub.gated:
            return True
        has_token = "Authorization" in self.headers
        if has_token and self._hub.granted:
            return True
        self._refuse(403 if has_token else 401, "GatedRepo", f"Access to model {repo_id} is restricted")
        return False

    def _is_faulty(self, fault: Fault | None) -> bool:
        """Stall, and answer with the fault's status. Return True if an answer was sent."""
        if fault is not None and fault.stall and not fault.stall_at:
            time.sleep(fault.stall)
        if fault is None or not fault.status:
            return False
        self._send(fault.status, fault.body, dict(fault.headers), None)
        return True

    def _refuse(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        extra = {**(headers or {}), "X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
        self._send(status, json.dumps({"error": message}).encode(), extra, None)

    def _send_file(self, file: StoredFile, headers: dict[str, str], fault: Fault | None) -> None:
        start, end, status = 0, file.size, 200
        asked = self.headers.get("Range")
        condition = self.headers.get("If-Range")
        etag = (fault.headers.get("ETag") if fault else None) or headers["ETag"]
        if asked and not (fault and fault.ignore_range) and condition in (None, etag):
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, status = int(first), 206
            end = min(file.size, int(last) + 1 if last else file.size, start + self._hub.longest_range)
            if start >= file.size:
                self._send(416, b"", {**headers, "Content-Range": f"bytes */{file.size}"}, None)
                return
            shift = fault.shift_range if fault else 0
            start, end = start + shift, min(file.size, end + shift)
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{file.size}"
        self._send_head(status, end - start, headers, fault)
        if self.command == "GET":
            self._send_body(file, start, end, fault)

    def _send(self, status: int, body: bytes, headers: Mapping[str, str], fault: Fault | None) -> None:
        self._send_head(status, len(body), headers, fault)
        if self.command != "HEAD":
            cut = len(body) if fault is None or fault.cut is None else fault.cut
            self.wfile.write(body[:cut])
            self._log.sent += len(body[:cut])
            self._break_off(fault)

    def _send_head(self, status: int, length: int, headers: Mapping[str, str], fault: Fault | None) -> None:
        self._log.status = status
        self.send_response(status)
        final = {"Content-Length": str(length), **headers, **(fault.headers if fault else {})}
        if fault is not None and fault.no_length:
            final |= {"Content-Length": "", "Connection": "close"}
            self.close_connection = True
        for name, value in final.items():
            if value:
                self.send_header(name, value)
        self.end_headers()

    def _send_body(self, file: StoredFile, start: int, end: int, fault: Fault | None) -> None:
        stop = end if fault is None or fault.cut is None else min(end, start + fault.cut)
        if isinstance(file.content, bytes):
            self._send_pieces(memoryview(file.content), start, stop, fault)
        elif fault is None and self._hub.bytes_per_second is None:
            with file.content.open("rb") as stream:
                self._log.sent += self.connection.sendfile(stream, start, stop - start)
        else:
            with file.content.open("rb") as stream:
                for offset in range(start, stop, _PIECE):
                    stream.seek(offset)
                    piece = stream.read(min(_PIECE, stop - offset))
                    self._send_piece(piece, offset, fault)
        self._break_off(fault)

    def _send_pieces(self, content: memoryview, start: int, stop: int, fault: Fault | None) -> None:
        for offset in range(start, stop, _PIECE):
            self._send_piece(content[offset : min(stop, offset + _PIECE)], offset, fault)

    def _send_piece(self, piece: bytes | memoryview, offset: int, fault: Fault | None) -> None:
        """Send one piece of the file, paced and spoilt as ordered."""
        if fault is not None and fault.flip is not None and offset <= fault.flip < offset + len(piece):
            flipped = bytearray(piece)
            flipped[fault.flip - offset] ^= 0xFF
            piece = bytes(flipped)
        if fault is not None and fault.stall_at and offset <= fault.stall_at < offset + len(piece):
            keep = fault.stall_at - offset
            self.wfile.write(piece[:keep])
            time.sleep(fault.stall)
            piece = piece[keep:]
        begun = time.monotonic()
        self.wfile.write(piece)
        self._log.sent += len(piece)
        if self._hub.bytes_per_second:
            due = begun + len(piece) / self._hub.bytes_per_second
            time.sleep(max(0.0, due - time.monotonic()))

    def _break_off(self, fault: Fault | None) -> None:
        if fault is None or fault.cut is None:
            return
        self.close_connection = True
        if fault.reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
