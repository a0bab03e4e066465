"""A client of a server's video jobs, for the page."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping, Sequence
from typing import Any

import httpx

from port_kit.page.form import bounded

#: One file of a form: the field's name, then the file's name and content.
Upload = tuple[str, tuple[str, bytes]]


class JobError(Exception):
    """The server did not do what was asked.

    Attributes:
        status: the HTTP status; 0 if no server answers.
        message: of the server, bounded.
    """

    def __init__(self, status: int, message: str) -> None:
        self.message = bounded(message)
        super().__init__(self.message)
        self.status = status


class JobClient:
    """Talks to one server.

    Args:
        url: of the server, without ``/v1``.
        key: API key, for a server that has some.
        timeout: seconds of one call.

    Attributes:
        url: of the server.
    """

    def __init__(self, url: str, key: str = "", timeout: float = 60.0) -> None:
        self.url = url.rstrip("/")
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._timeout = httpx.Timeout(timeout, connect=5.0)

    async def model(self) -> str:
        """Return the name of the served model.

        Raises:
            JobError: no server answers, or it does not accept the API key.
        """
        listed = (await self._call("GET", "/v1/models")).json().get("data") or [{}]
        return str(listed[0].get("id", "")).rstrip("/").rpartition("/")[2]

    async def submit(self, form: Mapping[str, str], files: Sequence[Upload] = ()) -> dict[str, Any]:
        """Start a job and return its record.

        Raises:
            JobError: the server refuses the request.
        """
        # without a file, a form would be URL-encoded, and those have a smaller limit
        parts: list[Any] = [(name, (None, value)) for name, value in form.items()]
        return _record(await self._call("POST", "/v1/videos", files=[*parts, *files]))

    async def status(self, job: str) -> dict[str, Any]:
        """Return the record of a job.

        Raises:
            JobError: there is no such job (404), or it has failed, with the status of its failure.
        """
        return _record(await self._call("GET", f"/v1/videos/{job}"))

    async def content(self, job: str) -> bytes:
        """Return the MP4 of a completed job."""
        return (await self._call("GET", f"/v1/videos/{job}/content")).content

    async def delete(self, job: str) -> None:
        """Delete a job and its file; one that is not finished is cancelled."""
        await self._call("DELETE", f"/v1/videos/{job}")

    async def _call(self, method: str, path: str, **parts: Any) -> httpx.Response:
        try:
            # a new connection per call: the server closes idle ones, also just when the next request is on its way
            async with httpx.AsyncClient(
                headers=self._headers, timeout=self._timeout, trust_env=not _is_loopback(self.url)
            ) as http:
                answer = await http.request(method, self.url + path, **parts)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            reason = str(error) or type(error).__name__
            raise JobError(
                0, f"no server answers at {self.url}: {reason}\nhint: start one with port-kit serve MODEL"
            ) from error
        if not answer.is_success:
            raise JobError(answer.status_code, _message(answer))
        return answer


def _is_loopback(url: str) -> bool:
    """Return True for a server of this machine, which no proxy reaches."""
    try:
        host = httpx.URL(url).host
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except (httpx.InvalidURL, ValueError):
        return False


def _record(answer: httpx.Response) -> dict[str, Any]:
    record: dict[str, Any] = answer.json()
    return record


def _message(answer: httpx.Response) -> str:
    """Return the message of an error, or of the record of a failed job."""
    try:
        body = answer.json()
    except ValueError:
        return answer.text
    error = body.get("error") if isinstance(body, dict) else None
    message = error.get("message") if isinstance(error, dict) else error
    return str(message or answer.text)
