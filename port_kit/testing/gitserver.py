"""Real git remotes on this machine: over ``file://`` and over smart http, with faults on demand.

::

    remote = GitRemote(tmp_path / "code", {"my_model/__init__.py": "x = 1"})
    with GitServer(tmp_path) as server:
        GitCode("my_code", server.url("code"), ("my_model",), commit=remote.head)
"""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

_IDENTITY = {
    "GIT_CONFIG_GLOBAL": os.devnull,
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_AUTHOR_NAME": "test",
    "GIT_AUTHOR_EMAIL": "test@example.org",
    "GIT_COMMITTER_NAME": "test",
    "GIT_COMMITTER_EMAIL": "test@example.org",
}


class GitRemote:
    """A repository with a work tree, to commit to and to fetch from."""

    def __init__(self, folder: Path, files: Mapping[str, str | bytes]) -> None:
        self.folder = folder
        folder.mkdir(parents=True)
        self.git("init", "--quiet", "--initial-branch=main")
        self.git("config", "uploadpack.allowAnySHA1InWant", "true")
        self.commit(files)

    @property
    def url(self) -> str:
        """The ``file://`` URL."""
        return self.folder.absolute().as_uri()

    @property
    def head(self) -> str:
        """The commit that ``main`` points to."""
        return self.git("rev-parse", "HEAD").strip()

    def commit(self, files: Mapping[str, str | bytes]) -> str:
        """Write files, commit everything, and return the commit."""
        for path, content in files.items():
            target = self.folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content.encode() if isinstance(content, str) else content)
        self.git("add", "--all")
        self.git("commit", "--quiet", "--allow-empty", "--message", "change")
        return self.head

    def git(self, *arguments: str) -> str:
        """Run git in the work tree."""
        done = subprocess.run(
            ["git", *arguments],
            cwd=self.folder,
            env={**os.environ, **_IDENTITY},
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout


class GitServer:
    """Serves the repositories of a folder through ``git http-backend``; a context manager.

    Args:
        root: holds the repositories.
        status: answer everything with this status instead (401, 404, 500).
        stall: seconds of silence before each answer.
    """

    def __init__(self, root: Path, *, status: int = 0, stall: float = 0.0) -> None:
        self.root, self.status, self.stall = root, status, stall
        self.requests: list[str] = []
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.owner = self

    def url(self, name: str) -> str:
        """Return the URL of the repository in the folder ``name``."""
        return f"http://127.0.0.1:{self._server.server_address[1]}/{name}/.git"

    def __enter__(self) -> GitServer:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    owner: GitServer

    def handle_error(self, request: object, client_address: object) -> None:
        """Print no traceback for killed clients: tests kill them on purpose."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def log_message(self, format: str, *args: object) -> None:
        """Requests are kept in ``requests`` instead of printed."""

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        owner = self.server.owner
        owner.requests.append(f"{self.command} {self.path}")
        time.sleep(owner.stall)
        if owner.status:
            self.send_error(owner.status)
            return
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        done = subprocess.run(
            ["git", "http-backend"], input=body, env=self._environment(), capture_output=True, check=False
        )
        head, _, content = done.stdout.partition(b"\r\n\r\n")
        fields = [line.partition(": ")[::2] for line in head.decode().splitlines()]
        status = next((value for name, value in fields if name == "Status"), "200 OK")
        self.send_response(int(status.split()[0]))
        for name, value in fields:
            if name != "Status":
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _environment(self) -> dict[str, str]:
        """The CGI variables of the request."""
        parts = urlsplit(self.path)
        return {
            **os.environ,
            **_IDENTITY,
            "GIT_PROJECT_ROOT": str(self.server.owner.root),
            "GIT_HTTP_EXPORT_ALL": "1",
            "PATH_INFO": parts.path,
            "QUERY_STRING": parts.query,
            "REQUEST_METHOD": self.command,
            "CONTENT_TYPE": self.headers.get("Content-Type", ""),
            "HTTP_CONTENT_ENCODING": self.headers.get("Content-Encoding", ""),
            "GIT_PROTOCOL": self.headers.get("Git-Protocol", ""),
            "REMOTE_ADDR": "127.0.0.1",
        }
