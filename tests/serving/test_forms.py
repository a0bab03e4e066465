"""Reading of forms: the charset, and the end of a multipart body."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from port_kit.registry import find_port
from port_kit.serving.asgi import Message, Refusal
from port_kit.serving.forms import Form, read_form
from port_kit.serving.limits import Limits
from port_kit.serving.served import Served
from port_kit.serving.video_form import check_video_form

MULTIPART, URL_ENCODED = "multipart/form-data; boundary=b", "application/x-www-form-urlencoded"
BODY = b'--b\r\nContent-Disposition: form-data; name="prompt"\r\n\r\nra\xc3\xafn\r\n'
BODY += b'--b\r\nContent-Disposition: form-data; name="seed"\r\n\r\n3'


def read(content_type: str, body: bytes, *, size: int = 7) -> Form:
    """Read a body that arrives in parts of ``size`` bytes."""
    parts = [body[start : start + size] for start in range(0, len(body), size)] or [b""]
    messages: list[Message] = [{"type": "http.request", "body": part, "more_body": True} for part in parts]
    messages[-1]["more_body"] = False

    async def receive() -> Message:
        return messages.pop(0)

    scope: dict[str, Any] = {"type": "http", "headers": [(b"content-type", content_type.encode("latin-1"))]}
    return asyncio.run(read_form(scope, receive, Limits()))


@pytest.mark.parametrize("end", [b"\r\n--b--\r\n", b"\r\n--b--", b"\r\n--b--epilogue"])
@pytest.mark.parametrize(
    "content_type", [MULTIPART, f"{MULTIPART}; charset=UTF-8", 'Multipart/Form-Data; boundary="b"']
)
def test_a_complete_form_is_read(content_type: str, end: bytes) -> None:
    for size in (1, 7, 10_000):
        assert read(content_type, BODY + end, size=size).fields == {"prompt": "ra\u00efn", "seed": "3"}


@pytest.mark.parametrize("end", [b"", b"\r\n--b", b"\r\n--b-", b"\r\n--b\r\n", b"--b--"])
def test_a_form_without_its_end_is_refused(end: bytes) -> None:
    """The parser would leave out the last field."""
    for size in (1, 7, 10_000):
        with pytest.raises(Refusal, match="cannot be read"):
            read(MULTIPART, BODY + end, size=size)


@pytest.mark.parametrize("charset", ["unicode_escape", "utf-16", "hex", "idna", "punycode", "latin-1", "\u00e4"])
def test_a_charset_chooses_no_decoder(charset: str) -> None:
    for content_type, body in ((MULTIPART, BODY + b"\r\n--b--"), (URL_ENCODED, b"prompt=a")):
        with pytest.raises(Refusal, match="texts of a form are UTF-8"):
            read(f"{content_type}; charset={charset}", body)
    assert read(URL_ENCODED, b"prompt=a&seed=3").fields == {"prompt": "a", "seed": "3"}


def checked(served: Served, **fields: str) -> dict[str, str]:
    """Return the fields of a form for videos as the server receives them."""
    form = Form({"prompt": "rain", **fields})
    asyncio.run(check_video_form(form, served, Limits()))
    return form.fields


@pytest.mark.parametrize(
    ("seconds", "frames"), [("0.01", "5"), ("0.7", "17"), ("5", "121"), ("8", "193"), ("8.1", "193"), ("8.2", "197")]
)
def test_seconds_become_the_nearest_number_of_frames(seconds: str, frames: str) -> None:
    assert checked(Served(None, "video", fps=24, frame_step=4), seconds=seconds)["num_frames"] == frames


@pytest.mark.parametrize(
    "fields", [{"seconds": "0"}, {"seconds": "-5"}, {"seconds": "nan"}, {"seconds": "1e308"}, {"num_frames": "1"}]
)
def test_a_length_that_no_video_has_is_refused(fields: dict[str, str]) -> None:
    with pytest.raises(Refusal, match=next(iter(fields))):
        checked(Served(None, "video", fps=24, frame_step=4), **fields)


#: Fields that the nodes for ComfyUI send as Python writes their values.
NEUTRAL = {"n": "1", "true_cfg_scale": "1.0", "vae_use_slicing": "False", "vae_use_tiling": "False"}
OVI = Served(find_port("ovi"), "video", fps=24, frames=121)


def test_neutral_values_are_dropped() -> None:
    assert checked(OVI, **NEUTRAL) == {"prompt": "rain"}


@pytest.mark.parametrize(
    ("name", "value"), [("n", "2"), ("true_cfg_scale", "4.0"), ("vae_use_slicing", "True"), ("vae_use_tiling", "")]
)
def test_other_values_of_neutral_fields_are_refused(name: str, value: str) -> None:
    with pytest.raises(Refusal, match=f"{name} is '{value}'; this model accepts "):
        checked(OVI, **{**NEUTRAL, name: value})


def test_a_neutral_field_that_the_model_has_is_passed_on() -> None:
    assert checked(Served(None, "video"), true_cfg_scale="1.0")["true_cfg_scale"] == "1.0"
