"""The Hub as this kit uses it: resolve a revision, list a tree, probe a gate, open a file, read a range.

Endpoint, token, headers and error classes are huggingface_hub's. The exchanges are our own, because its client has no
timeout on the API, no retry on most of it, and follows ``Link: next`` with the token to any host.

A repository in Xet storage is fetched like any other: the Hub serves its files over plain HTTP too, with ranges. That
way is resumable, needs no second cache, and ends in the sha256 that the Hub states, which hf_xet does not check.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import quote, urljoin, urlsplit

from port_kit import __version__
from port_kit.download.http import RETRIED_STATUS, HttpClient, Response
from port_kit.download.parts import FileSpec
from port_kit.download.urls import TransportError, follow_location, origin_of
from port_kit.errors import DownloadError
from port_kit.escape import escape_control_chars, quoted

# RFC 8288: links are separated by commas; each is a target and parameters, whose values may be quoted.
_LINK = re.compile(r'<([^>]*)>((?:\s*;\s*[^\s=;,"]+(?:\s*=\s*(?:"(?:[^"\\]|\\.)*"|[^\s;,"]*))?)*)')
_PARAMETER = re.compile(r';\s*([^\s=;,"]+)(?:\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s;,"]*)))?')
_SENDABLE = re.compile(r"Bearer [\x21-\x7e]+")
_SHA1, _SHA256 = re.compile("[0-9a-f]{40}"), re.compile("[0-9a-f]{64}")
_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)")
_MOST_PAGES, _MOST_EMPTY_PAGES = 5000, 5
_MOST_RENAMES = 5
_LONGEST_REASON = 1 << 16


@dataclass(frozen=True)
class HubFile:
    """A file as the Hub states it: ``sha256`` for LFS files, the git blob hash for the others."""

    path: str
    size: int
    sha256: str | None
    git_sha1: str

    @property
    def digest(self) -> str:
        """``sha256:...`` or ``git:...``, whichever is the hash of the content."""
        return f"sha256:{self.sha256}" if self.sha256 else f"git:{self.git_sha1}"


class HubClient:
    """Requests to one endpoint. The token is sent to that endpoint's origin only.

    Args:
        http: the connections.
        endpoint: default ``HF_ENDPOINT``, then the public Hub.
        token: a token; None takes the one that huggingface_hub finds (``HF_TOKEN``, login); False sends none.
    """

    def __init__(self, http: HttpClient, *, endpoint: str | None = None, token: str | bool | None = None) -> None:
        from huggingface_hub import constants

        self.http = http
        self.endpoint = _checked_endpoint(endpoint or constants.ENDPOINT)
        self._origin = origin_of(self.endpoint)
        headers = _headers(token)
        self._authorization = _checked_token(headers.pop("authorization", headers.pop("Authorization", None)))
        self._headers, self.has_token = headers, self._authorization is not None

    def headers_for(self, url: str) -> dict[str, str]:
        """Headers of a request to ``url``: with the token for the endpoint's own origin only."""
        if self._authorization and origin_of(url) == self._origin:
            return {**self._headers, "authorization": self._authorization}
        return dict(self._headers)

    def resolve(self, repo_id: str, revision: str) -> str:
        """Return the commit (40 hex digits) that a branch, tag or commit stands for."""
        url = f"{self.endpoint}/api/models/{repo_id}/revision/{quote(revision, safe='')}"
        info, _ = self._json(url, f"asking {self.endpoint} for revision {revision} of {repo_id}", repo_id, revision)
        commit = info.get("sha") if isinstance(info, dict) else None
        if not isinstance(commit, str) or not _SHA1.fullmatch(commit):
            raise self._not_a_hub(url, "no commit in the answer")
        return commit

    def tree(self, repo_id: str, commit: str) -> list[HubFile]:
        """Return all files of a commit; follows the pages, within the endpoint only.

        Raises:
            DownloadError: ``hub_endpoint`` for a list that cannot be read, or that is not complete.
        """
        url: str | None = f"{self.endpoint}/api/models/{repo_id}/tree/{commit}?recursive=true&expand=false"
        files: list[HubFile] = []
        folders: set[str] = set()
        seen: set[str] = set()
        empty = 0
        while url:
            if url in seen or len(seen) == _MOST_PAGES or empty > _MOST_EMPTY_PAGES:
                raise self._not_a_hub(url, f"the list of files does not end after {len(seen)} pages")
            seen.add(url)
            entries, link = self._json(url, f"asking {self.endpoint} for the files of {repo_id}", repo_id, commit)
            if not isinstance(entries, list):
                raise self._not_a_hub(url, "no list of files in the answer")
            empty = 0 if entries else empty + 1
            for entry in entries:
                found = _hub_entry(entry)
                if found is None:
                    raise self._not_a_hub(url, f"an entry without type, path, size or hash ({quoted(entry)})")
                if isinstance(found, str):
                    folders.add(found)
                else:
                    files.append(found)
            url = self._next_page(url, link)
        # Git stores no empty folders: one without files says that the list was not recursive.
        folders -= {str(parent) for file in files for parent in PurePosixPath(file.path).parents}
        if folders:
            place = f"{self.endpoint}/api/models/{repo_id}/tree/{commit}"
            raise self._not_a_hub(place, f"a list of files that lacks those of the folder {min(folders)}")
        return files

    def _next_page(self, url: str, link: str) -> str | None:
        found = _next_link(link)
        if found is None:
            return None
        try:
            following = urljoin(url, found)
            origin = origin_of(following)
        except ValueError as error:
            raise self._not_a_hub(url, f"the Link header {quoted(found)}") from error
        if origin != self._origin:
            raise DownloadError(
                f"{self.endpoint} names {origin[1]} in its Link header for the next page of files; "
                "the token is sent to the configured endpoint only",
                code="hub_foreign_link",
                hint="the mirror is set up wrongly: use another endpoint (HF_ENDPOINT)",
            )
        return following

    def probe(self, spec: FileSpec) -> None:
        """Request the head of one file, to detect missing permissions before any large transfer."""
        url = self.url(spec)

        def ask() -> None:
            found, place = None, url
            for _ in range(_MOST_RENAMES):
                with self.http.request("HEAD", place, self.headers_for, follow=False) as response:
                    self.check(response, spec.repo_id, spec.commit, spec.path)
                    found, location = response.headers.get("X-Repo-Commit"), response.headers.get("Location")
                # A repository that was renamed is answered for under its new name, at the same Hub.
                if found or not location or origin_of(place := follow_location(place, location)) != self._origin:
                    break
            if found != spec.commit:
                said = f"X-Repo-Commit {found}" if found else "no X-Repo-Commit header"
                raise self._not_a_hub(url, f"{said}, {spec.commit} is required")

        self.http.retrying(f"asking {self.endpoint} for a file of {spec.repo_id}", ask)

    def open(self, spec: FileSpec, headers: Mapping[str, str], location: str | None = None) -> Response:
        """Request a file's bytes; ``location`` is the target of an earlier redirect.

        Raises:
            TransportError: worth another attempt.
            DownloadError: not.
        """
        url = location or self.url(spec)
        response = self.http.request("GET", url, lambda hop: {**self.headers_for(hop), **headers})
        self.check(response, spec.repo_id, spec.commit, spec.path)
        return response

    def url(self, spec: FileSpec) -> str:
        """Return the URL of a file."""
        return f"{self.endpoint}/{spec.repo_id}/resolve/{quote(spec.commit, safe='')}/{quote(spec.path)}"

    def _json(self, url: str, what: str, repo_id: str, revision: str) -> tuple[Any, str]:
        """Return the JSON of an answer and its Link headers."""

        def ask() -> tuple[Any, str]:
            with self.http.request("GET", url, self.headers_for) as response:
                self.check(response, repo_id, revision)
                body, link = response.read_all(), ", ".join(response.headers.get_all("Link") or ())
            try:
                return json.loads(body), link
            except (ValueError, RecursionError) as error:
                raise self._not_a_hub(url, f"{quoted(body)} instead of JSON") from error

        return self.http.retrying(what, ask)

    def check(self, response: Response, repo_id: str, revision: str, path: str = "") -> None:
        """Raise the error of an answer's status: :class:`TransportError` if waiting may help."""
        if response.status < 400 or response.status == 416:
            return
        what = f"{repo_id}/{path}" if path else repo_id
        if response.status in RETRIED_STATUS:
            headers, status = response.headers, response.status
            body = response.read_all(_LONGEST_REASON) if (response.length or _LONGEST_REASON) < _LONGEST_REASON else b""
            response.close()
            self.http.wait_as_told(what, headers)
            raise TransportError(f"HTTP {status}{_reason(headers.get('X-Error-Message'), body)}")
        body = response.read_all(1 << 20) if response.length != 0 and response.status != 304 else b""
        raise self._refusal(response, body, repo_id, revision, path)

    def _refusal(self, response: Response, body: bytes, repo_id: str, revision: str, path: str) -> DownloadError:
        """Return the error that the Hub's header, or else the status, names, with a remedy."""
        page, status = f"{self.endpoint}/{repo_id}", response.status
        said = _reason(response.headers.get("X-Error-Message"), body)
        named = response.headers.get("X-Error-Code")
        if named == "GatedRepo":
            return _gated(repo_id, page, self.has_token, said)
        if named == "RevisionNotFound":
            return _missing("revision", f"{repo_id} has no revision {revision}{said}", "correct the recipe's revision")
        if named == "EntryNotFound":
            return _missing("file", f"{repo_id} has no file {path} at {revision}{said}", "correct the recipe's pattern")
        if "Invalid credentials" in said:
            return DownloadError(
                f"{self.endpoint} does not accept the token that was sent (asked for {repo_id}){said}",
                code="hub_token_invalid",
                hint="log in again with `hf auth login`, or correct or unset HF_TOKEN",
            )
        if status in (401, 404) and self.has_token:
            message = (
                f"there is no repository {repo_id} at {self.endpoint}, or it is private and this token may not see it"
            )
            return _missing("repo", message + said, f"open {page} in a browser to see which")
        if status == 401:
            return DownloadError(
                f"{repo_id} at {self.endpoint} does not exist, or is private; no token was sent{said}",
                code="hub_token_missing",
                hint="check the name; for a private repository log in with `hf auth login` or set HF_TOKEN",
            )
        if status == 404:
            return _missing("repo", f"there is no repository {repo_id} at {self.endpoint}{said}", "correct the recipe")
        return DownloadError(
            f"{self.endpoint} refuses {repo_id} with HTTP {status}{said}", code="hub_refused", hint=f"open {page}"
        )

    def _not_a_hub(self, url: str, found: str) -> DownloadError:
        return DownloadError(
            f"{self.endpoint} does not answer like a Hub: {found} at {urlsplit(url).path}",
            code="hub_endpoint",
            hint="check HF_ENDPOINT or --endpoint",
        )


class _RangesIgnored(TransportError):
    """The server sends the complete file in response to a range request."""


class RangeSource:
    """A file of the Hub as a :class:`~port_kit.checkpoint.byte_sources.ByteSource`, read by ranged requests."""

    def __init__(self, hub: HubClient, spec: FileSpec) -> None:
        self._hub, self._spec = hub, spec
        self.name, self.size = f"{spec.repo_id}/{spec.path}", spec.size

    def read_at(self, offset: int, length: int) -> bytes:
        """See :class:`~port_kit.checkpoint.byte_sources.ByteSource`.

        Raises:
            DownloadError: ``convert_layout`` if the server sends the complete file instead of ranges.
        """
        end, found = min(offset + length, self.size), bytearray()
        while (position := offset + len(found)) < end:
            try:
                what = f"reading the directory of {self.name}"
                found += self._hub.http.retrying(what, partial(self._ask, position, end))
            except DownloadError as error:
                if not isinstance(error.__cause__, _RangesIgnored):
                    raise
                raise DownloadError(
                    f"{self.name} cannot be read in parts: {error.__cause__}",
                    code="convert_layout",
                    hint="use another endpoint, or download it as it is and convert it on disk: --keep-original",
                ) from error
        return bytes(found)

    def _ask(self, offset: int, end: int) -> bytes:
        with self._hub.open(self._spec, {"Range": f"bytes={offset}-{end - 1}"}) as response:
            if response.status == 200:
                raise _RangesIgnored("the server ignores ranges and sends the whole file")
            if response.status != 206:
                raise TransportError(f"HTTP {response.status} instead of a range")
            count = length_of_range(response, offset, end, self.size)
            body = response.read_all()
            if len(body) < count:
                raise TransportError(f"a range of {count} bytes has {len(body)}")
            return body[:count]


def length_of_range(response: Response, start: int, end: int, size: int) -> int:
    """Return the size of a 206: it must begin at the requested offset and end no later; it may end earlier."""
    said = response.headers.get("Content-Range")
    found = _CONTENT_RANGE.fullmatch(said or "")
    last = int(found[2]) if found else -1
    if found is None or int(found[1]) != start or not start <= last < end or found[3] not in (str(size), "*"):
        raise TransportError(f"asked for bytes from {start} to {end - 1} of {size}, the server sends {quoted(said)}")
    if response.length not in (None, last + 1 - start):
        raise TransportError(f"the server states the range {quoted(said)} and {response.length} bytes")
    return last + 1 - start


def _checked_endpoint(endpoint: str) -> str:
    """Return a URL that can be asked, without its last slash."""
    try:
        parts = urlsplit(endpoint)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable or parts.username is not None or parts.query or parts.fragment or not endpoint.isascii():
        shown = endpoint.rpartition("@")[2]
        raise DownloadError(
            f"the endpoint {quoted(shown)} is not http(s)://HOST[:PORT][/PATH], without a user's name or password",
            code="hub_endpoint",
            hint="check HF_ENDPOINT or --endpoint; tokens are set with HF_TOKEN",
        )
    return endpoint.rstrip("/")


def _checked_token(authorization: str | None) -> str | None:
    """Reject a token that cannot be sent, without printing it."""
    if authorization is None or authorization.strip() == "Bearer":
        return None
    if not _SENDABLE.fullmatch(authorization):
        raise DownloadError(
            "the token holds characters that no token has (blanks, line ends, letters with accents)",
            code="hub_token_invalid",
            hint="log in again with `hf auth login`, or correct or unset HF_TOKEN",
        )
    return authorization


def _hub_entry(entry: object) -> HubFile | str | None:
    """Read an entry of a tree: a file, a folder's path, or None for anything else."""
    if not isinstance(entry, Mapping) or not isinstance(entry.get("path"), str):
        return None
    path, lfs = entry["path"], entry.get("lfs") or {}
    if entry.get("type") == "directory":
        return str(path)
    if entry.get("type") != "file" or not isinstance(lfs, Mapping):
        return None
    size, git_sha1 = lfs.get("size", entry.get("size")), str(entry.get("oid"))
    sha256 = str(lfs.get("oid")) if lfs else None
    hashed = _SHA1.fullmatch(git_sha1) and (sha256 is None or _SHA256.fullmatch(sha256))
    return HubFile(path, size, sha256, git_sha1) if hashed and type(size) is int and size >= 0 else None


def _next_link(header: str) -> str | None:
    """Return the target of the link whose relation is ``next`` (RFC 8288)."""
    for target, parameters in _LINK.findall(header):
        relations = [quoted or bare for name, quoted, bare in _PARAMETER.findall(parameters) if name.lower() == "rel"]
        if relations and "next" in relations[0].casefold().split():  # the first one counts
            return str(target)
    return None


def _reason(header: str | None, body: bytes) -> str:
    """Return the Hub's reason for a refusal, as a suffix of a message."""
    try:
        stated = json.loads(body) if body[:1] == b"{" else {}
    except (ValueError, RecursionError):
        stated = {}
    said = header or (stated.get("error") if isinstance(stated, dict) else None)
    return f" (it says: {escape_control_chars(said.strip()[:300])})" if isinstance(said, str) and said.strip() else ""


def _headers(token: str | bool | None) -> dict[str, str]:
    """The headers of huggingface_hub, with the token that it finds.

    Its code for that costs half a second of each start, so it is called only if there may be a token.
    """
    import huggingface_hub

    if token is False or (token is None and not _may_have_token()):
        python = ".".join(map(str, sys.version_info[:3]))
        return {"user-agent": f"port-kit/{__version__}; hf_hub/{huggingface_hub.__version__}; python/{python}"}
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers

    try:
        return build_hf_headers(token=token, library_name="port-kit", library_version=__version__)
    except (OSError, UnicodeError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or "it is no text"
        raise DownloadError(
            f"the token in {constants.HF_TOKEN_PATH} cannot be read: {reason}",
            code="hub_token_invalid",
            hint="correct the file or its rights, log in again with `hf auth login`, or set HF_TOKEN",
        ) from error


def _may_have_token() -> bool:
    """Return True if there may be a token in the environment, in huggingface_hub's file, or in a notebook's secrets."""
    from huggingface_hub import constants

    named = any(name in os.environ for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"))
    return named or os.path.exists(constants.HF_TOKEN_PATH) or "IPython" in sys.modules


def _gated(repo_id: str, page: str, has_token: bool, reason: str) -> DownloadError:
    said = "the token that was sent has not been granted access" if has_token else "no token was sent"
    todo = f"accept its terms at {page}"
    hint = todo if has_token else f"{todo}, then log in with `hf auth login` or set HF_TOKEN"
    return DownloadError(f"{repo_id} is gated: {said}{reason}", code="hub_gated", hint=hint, repository=repo_id)


def _missing(kind: str, message: str, hint: str) -> DownloadError:
    return DownloadError(message, code=f"hub_{kind}_missing", hint=hint)
