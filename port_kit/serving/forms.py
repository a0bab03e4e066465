"""Bodies of requests: read within bounds, and written again for vLLM-Omni's server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from typing import Any, BinaryIO

import httpx
from python_multipart.multipart import parse_options_header
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import FormParser, MultiPartException, MultiPartParser

from port_kit.escape import escape_control_chars, quoted, reason_of, shortened
from port_kit.serving.asgi import Message, Receive, Refusal, Scope, header
from port_kit.serving.limits import Limits, option
from port_kit.serving.strict_json import parse_json

#: Fields and files of a form, and bytes of one field, which may hold references as data URLs.
MAX_FIELDS, MAX_FILES, MAX_FIELD_BYTES = 64, 32, 48 * 2**20
#: Characters of a field without references, and of the name of a field or a file.
MAX_TEXT, MAX_NAME = 2**16, 256
#: Size of a body without files: a URL-encoded form, whose decoding is slow, or JSON.
TEXT_MB = 1.0
#: Fields of the form of ``/v1/images/edits`` that list images by URL, and those that hold a file or one URL.
URL_FIELDS, FILE_OR_URL_FIELDS = ("url", "url[]"), ("mask_image", "reference_image")
#: Fields that hold references.
_LONG = ("image_reference", "audio_reference", *URL_FIELDS, *FILE_OR_URL_FIELDS)


@dataclass
class Upload:
    """A file of a form.

    Attributes:
        field: name of the form's field.
        name: file name that the client gave; for messages only.
        file: content, at its start.
    """

    field: str
    name: str
    file: BinaryIO


@dataclass
class Form:
    """A form that was read completely.

    Attributes:
        fields: values by name; of a repeated field, the last value counts.
        urls: values of the fields :data:`URL_FIELDS`, in their order.
        uploads: files in their order.
    """

    fields: dict[str, str] = field(default_factory=dict)
    urls: list[str] = field(default_factory=list)
    uploads: list[Upload] = field(default_factory=list)

    def close(self) -> None:
        """Delete the files."""
        for upload in self.uploads:
            upload.file.close()

    def encode(self) -> tuple[bytes, bytes]:
        """Return the form as a multipart body, with its content type."""
        files = [(upload.field, (upload.name, upload.file)) for upload in self.uploads]
        # a form without files would be URL-encoded; all forms are multipart here
        parts: list[Any] = [(name, (None, value)) for name, value in self.fields.items()]
        request = httpx.Request("POST", "http://server", files=parts + files)
        return request.read(), request.headers["content-type"].encode()


async def read_form(scope: Scope, receive: Receive, limits: Limits) -> Form:
    """Read a form, and stop as soon as it exceeds a limit.

    Raises:
        Refusal: the body is too large, too slow, or no form.
    """
    kind, options = _content_type(scope)
    headers = Headers(raw=scope["headers"])
    parser: MultiPartParser | FormParser
    if kind == "multipart/form-data":
        stream: Any = _complete(read_body(scope, receive, limits), options.get(b"boundary", b""))
        parser = MultiPartParser(
            headers, stream, max_files=MAX_FILES, max_fields=MAX_FIELDS, max_part_size=MAX_FIELD_BYTES
        )
    elif kind == "application/x-www-form-urlencoded":
        stream = read_body(scope, receive, _without_files(limits))
        parser = FormParser(headers, stream, max_fields=MAX_FIELDS, max_part_size=MAX_FIELD_BYTES)
    else:
        raise Refusal(400, f"content-type is {quoted(kind or 'missing')}; multipart/form-data is required")
    try:
        items = (await parser.parse()).multi_items()
    except MultiPartException as error:
        raise Refusal(400, f"the form cannot be read: {reason_of(error)}") from error
    return _collect(items)


def _content_type(scope: Scope) -> tuple[str, dict[bytes, bytes]]:
    """Return the type of a body and its parameters; refuse a charset, with which a client would choose a decoder."""
    kind, options = parse_options_header(header(scope, "content-type"))
    charset = options.get(b"charset", b"utf-8").decode("latin-1")
    if charset.lower() not in ("utf-8", "utf8", "us-ascii"):
        raise Refusal(400, f"[input_type] the charset is {quoted(charset)}; texts of a form are UTF-8")
    return kind.decode("latin-1"), options


async def _complete(body: AsyncIterator[bytes], boundary: bytes) -> AsyncIterator[bytes]:
    """Yield a multipart body; refuse one without its end, whose last part the parser would leave out.

    Raises:
        Refusal: status 400.
    """
    end, tail, has_ended = b"\r\n--" + boundary + b"--", b"\r\n", False
    async for chunk in body:
        tail += chunk
        has_ended = has_ended or end in tail
        tail = tail[-len(end) :]
        yield chunk
    if not has_ended:
        raise Refusal(400, f"the form cannot be read: it has no end, which is {quoted(end.strip())}")


def _collect(items: list[tuple[str, Any]]) -> Form:
    form = Form()
    for name, value in items:
        _check_text("the name of a field", name, MAX_NAME)
        if isinstance(value, UploadFile):
            _check_text(f"the file name of {name}", value.filename or "", MAX_NAME)
            form.uploads.append(Upload(name, value.filename or "", value.file))
            continue
        if name in URL_FIELDS:
            form.urls.append(value)
        else:
            form.fields[name] = value
        _check_text(name, value, MAX_FIELD_BYTES if name in _LONG else MAX_TEXT)
    return form


def _check_text(what: str, text: str, limit: int) -> None:
    """Refuse a text that is too long, or that UTF-8 cannot express: the request's charset may allow such."""
    what = shortened(escape_control_chars(what))
    if len(text) > limit:
        raise Refusal(400, f"[input_size] {what} has {len(text)} characters; at most {limit} are accepted")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Refusal(400, f"[input_type] {what} is not valid Unicode text") from error


async def read_json(scope: Scope, receive: Receive, limits: Limits) -> dict[str, Any]:
    """Read a body of JSON, whose texts are as long as those of a form.

    Raises:
        Refusal: the body is too large, too slow, or no JSON object.
    """
    body = b"".join([chunk async for chunk in read_body(scope, receive, _without_files(limits))])
    found = await asyncio.to_thread(parse_json, body, "the body")
    if not isinstance(found, dict):
        raise Refusal(400, f"the body is {type(found).__name__}; a JSON object is required")
    for name, value in found.items():
        _check_text("the name of a field", name, MAX_NAME)
        if isinstance(value, str):
            _check_text(name, value, MAX_TEXT)
    return found


def _without_files(limits: Limits) -> Limits:
    return replace(limits, max_upload_mb=min(limits.max_upload_mb, TEXT_MB))


async def read_body(scope: Scope, receive: Receive, limits: Limits) -> AsyncIterator[bytes]:
    """Yield a body's parts; refuse it when it exceeds its limits of size and time.

    Raises:
        Refusal: with status 400 or 408.
    """
    declared = header(scope, "content-length") or "0"
    deadline = asyncio.get_running_loop().time() + limits.upload_seconds
    if not (declared.isascii() and declared.isdigit() and len(declared) < 20):
        raise Refusal(400, f"content-length is {quoted(declared)}; a number of bytes is required")
    _check_size(int(declared), limits)
    read, more = 0, True
    while more:
        try:
            async with asyncio.timeout_at(deadline):
                message = await receive()
        except TimeoutError as error:
            raise Refusal(
                408,
                f"the body did not arrive within {limits.upload_seconds:g} s ({option('upload_seconds')})",
            ) from error
        if message["type"] == "http.disconnect":
            raise Disconnected
        chunk = message.get("body", b"")
        read, more = read + len(chunk), message.get("more_body", False)
        _check_size(read, limits)
        yield chunk


class Disconnected(Exception):
    """The client left before its request was complete."""


def _check_size(size: int, limits: Limits) -> None:
    if size > limits.max_body:
        raise Refusal(
            400,
            f"the body has more than {limits.max_upload_mb:g} MB ({option('max_upload_mb')} of the server; "
            f"{TEXT_MB:g} for a URL-encoded form or JSON); send smaller references, as multipart/form-data",
        )


def replay(body: bytes, receive: Receive) -> Receive:
    """Return a ``receive`` that delivers a body at once, and then what the client sends (that it disconnects)."""
    pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def run() -> Message:
        return pending.pop() if pending else await receive()

    return run


def with_body(scope: Scope, body: bytes, content_type: bytes) -> Scope:
    """Return the scope of a request with another body."""
    dropped = (b"content-length", b"content-type", b"transfer-encoding")
    headers = [(name, value) for name, value in scope["headers"] if name.lower() not in dropped]
    headers += [(b"content-type", content_type), (b"content-length", str(len(body)).encode())]
    return {**scope, "headers": headers}
