"""A client of vLLM-Omni's video endpoints, for the examples beside it. It needs httpx only, neither torch nor vLLM.

client = VideoClient("http://127.0.0.1:8000")
mp4 = client.generate({"prompt": "...", "seed": 3}, files)            # POST /v1/videos/sync
job = client.submit({"prompt": "...", "seed": 3}, files)              # POST /v1/videos
mp4 = client.fetch(client.wait(job))                                  # GET /v1/videos/ID, .../content
client.delete(job)                                                    # DELETE /v1/videos/ID
"""

from __future__ import annotations

import argparse
import json
import mimetypes
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import httpx

#: One file of a form: the field's name, then the file's name, content and media type.
Upload = tuple[str, tuple[str, bytes, str]]
#: Called with the record of a job.
Show = Callable[[dict[str, Any]], None]

#: Exit code of a command that Ctrl-C ended.
INTERRUPTED = 130


class RefusedError(Exception):
    """The server did not serve a request.

    Attributes:
        status: the HTTP status; 4xx is the request's own fault.
        message: what the server says; of a port, ``[code] what is wrong`` and a line with a hint.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{status}: {message}")
        self.status = status
        self.message = message


class VideoClient:
    """Talks to one server.

    Args:
        url: of the server, without ``/v1``.
        timeout: seconds that a sync request may take; the server's own limit is VLLM_OMNI_VIDEO_SYNC_TIMEOUT.
        key: API key, for a server that has some.
    """

    def __init__(self, url: str, timeout: float = 600.0, key: str = "") -> None:
        # No connection is used twice: the server closes idle ones, also just when the next request is on its way.
        limits = httpx.Limits(max_keepalive_connections=0)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        timeouts = httpx.Timeout(timeout, connect=10.0)
        self._http = httpx.Client(base_url=url, limits=limits, timeout=timeouts, headers=headers)

    def generate(self, fields: Mapping[str, Any], files: Iterable[Upload] = ()) -> bytes:
        """Return the MP4 of one request; the connection stays open while it is made, and closing it cancels it.

        Args:
            fields: of the form: ``prompt``, ``width``, ``height``, ``num_inference_steps``, ``seed``, ...
            files: reference pictures and voices.

        Raises:
            RefusedError: the server refused the request, or failed.
        """
        return _checked(self._post("/v1/videos/sync", fields, files)).content

    def submit(self, fields: Mapping[str, Any], files: Iterable[Upload] = ()) -> str:
        """Start a job and return its id; arguments and errors as for :meth:`generate`."""
        return _checked(self._post("/v1/videos", fields, files)).json()["id"]

    def run(self, fields: Mapping[str, Any], files: Iterable[Upload] = (), show: Show | None = None) -> bytes:
        """Return the MP4 of one job, which is deleted on the server in any case; one that is unfinished is cancelled.

        Arguments and errors as for :meth:`generate` and :meth:`wait`.
        """
        job = self.submit(fields, files)
        try:
            return self.fetch(self.wait(job, show=show))
        finally:
            self.delete(job)

    def status(self, job: str) -> dict[str, Any]:
        """Return what the server knows of a job.

        Raises:
            RefusedError: there is no such job (404), or it has failed: then with the failure's own status.
        """
        return _checked(self._http.get(f"/v1/videos/{job}")).json()

    def wait(self, job: str, *, interval: float = 0.5, limit: float = 3600.0, show: Show | None = None) -> str:
        """Ask again and again until a job is completed, and return its id; errors as for :meth:`status`.

        Args:
            job: its id.
            interval: seconds between two questions.
            limit: seconds until :class:`TimeoutError`.
            show: called with the job's record whenever its place in the queue or its step has changed.
        """
        deadline, before = time.monotonic() + limit, None
        while (record := self.status(job))["status"] != "completed":
            if record["status"] == "cancelled":
                raise RefusedError(409, f"job {job} was cancelled")
            now = [record.get(name) for name in ("status", "queue_position", "step")]
            if show is not None and now != before:
                show(record)
            before = now
            if time.monotonic() > deadline:
                raise TimeoutError(f"job {job} is not finished after {limit:g} s")
            time.sleep(interval)
        return job

    def fetch(self, job: str) -> bytes:
        """Return the MP4 of a completed job."""
        return _checked(self._http.get(f"/v1/videos/{job}/content")).content

    def jobs(self) -> list[dict[str, Any]]:
        """Return all jobs of this client's API key, the newest first."""
        return _checked(self._http.get("/v1/videos")).json()["data"]

    def delete(self, job: str) -> None:
        """Delete a job and its file; one that is not finished is cancelled, and a record of it stays."""
        _checked(self._http.delete(f"/v1/videos/{job}"))

    def _post(self, path: str, fields: Mapping[str, Any], files: Iterable[Upload]) -> httpx.Response:
        form = {name: str(value) for name, value in fields.items() if value is not None}
        return self._http.post(path, data=form, files=list(files))


def upload(path: str | Path) -> tuple[str, bytes, str]:
    """Read a file for a form. The server recognizes it by its content, whatever its name and type say."""
    path = Path(path)
    return path.name, path.read_bytes(), mimetypes.guess_type(path.name)[0] or "application/octet-stream"


def describe(record: Mapping[str, Any]) -> str:
    """Return a line on an unfinished job, such as ``queued 3rd`` or ``step 12/50, 34 s left``."""
    place, step, left = (record.get(name) for name in ("queue_position", "step", "remaining_seconds"))
    if record["status"] == "queued":
        return f"queued {_ordinal(place)}" if place else "queued"
    if step is None:
        return "running"
    if step == record["steps"]:
        return f"step {step}/{step}, decoding"
    return f"step {step}/{record['steps']}" + ("" if left is None else f", {left:.0f} s left")


def _ordinal(number: int) -> str:
    endings = {1: "st", 2: "nd", 3: "rd"}
    return f"{number}{'th' if number // 10 % 10 == 1 else endings.get(number % 10, 'th')}"


def _checked(response: httpx.Response) -> httpx.Response:
    if response.is_success:
        return response
    error = {"message": response.text}
    if response.headers.get("content-type", "").startswith("application/json"):
        error = response.json().get("error") or error
    raise RefusedError(response.status_code, str(error["message"]))


def request_parser(documentation: str, options: Mapping[str, type], output: str) -> argparse.ArgumentParser:
    """Return a parser with what all examples take.

    Args:
        documentation: the example's.
        options: the port's own, which the form has no fields for, with their types.
        output: default name of the file that is written.
    """
    parser = argparse.ArgumentParser(description=documentation, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", default="http://127.0.0.1:8000")
    parser.add_argument("--api-key", default=os.environ.get("API_KEY", ""), help="default: the variable API_KEY")
    parser.add_argument("-o", "--output", default=output)
    parser.add_argument("--sync", action="store_true", help="one request that stays open, instead of a job")
    request = parser.add_argument_group("request (defaults are the model's)")
    request.add_argument("--prompt", default=None)
    for name in ("height", "width", "num-inference-steps", "seed"):
        request.add_argument(f"--{name}", type=int, default=None)
    request.add_argument(
        "--lora", nargs="+", action="extend", default=[], help="name of a LoRA on the server, or several"
    )
    request.add_argument("--lora-scale", nargs="+", action="extend", type=float, default=[], help="strength of each")
    for name, kind in options.items():
        request.add_argument(f"--{name.replace('_', '-')}", type=kind, default=None)
    return parser


def form_of(arguments: argparse.Namespace, options: Iterable[str]) -> dict[str, Any]:
    """Return the fields of the form; what is not given is left to the model, the port's own go in ``extra_params``."""
    names = ("prompt", "height", "width", "num_inference_steps", "seed")
    fields = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    extra = {name: getattr(arguments, name) for name in options if getattr(arguments, name) is not None}
    scales = arguments.lora_scale or [1.0] * len(arguments.lora)
    if len(scales) != len(arguments.lora):
        raise SystemExit("give one --lora-scale for each --lora, or none")
    loras = [{"name": name, "scale": scale} for name, scale in zip(arguments.lora, scales, strict=True)]
    given = {"extra_params": extra, "lora": loras}
    return {**fields, **{name: json.dumps(value) for name, value in given.items() if value}}


def ask(arguments: argparse.Namespace, fields: Mapping[str, Any], files: Iterable[Upload]) -> int:
    """Ask for one video and write it, and print how far it is to stderr.

    Returns:
        1 where the server refused, with its reason on stderr; 130 after Ctrl-C, which cancels the job.
    """
    client = VideoClient(arguments.server, key=arguments.api_key)
    try:
        if arguments.sync:
            video = client.generate(fields, files)
        else:
            video = client.run(fields, files, lambda record: print(describe(record), file=sys.stderr, flush=True))
    except RefusedError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("cancelled", file=sys.stderr)
        return INTERRUPTED
    Path(arguments.output).write_bytes(video)
    print(f"{arguments.output}: {len(video)} bytes")
    return 0
