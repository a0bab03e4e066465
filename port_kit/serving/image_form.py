"""Requests for images and for audio alone: exact names, and images checked by content before they are decoded."""

from __future__ import annotations

import difflib
import io
from collections.abc import Collection, Iterable
from typing import Any

from pydantic import BaseModel

from port_kit.serving.asgi import Refusal
from port_kit.serving.fetch import Fetcher
from port_kit.serving.forms import URL_FIELDS, Form, Upload
from port_kit.serving.limits import Limits
from port_kit.serving.pictures import check_picture
from port_kit.serving.references import content_of
from port_kit.serving.served import MAX_REFERENCES

#: Endpoints whose body is JSON.
JSON_ENDPOINTS = ("/v1/images/generations", "/v1/audio/generate")
#: Fields of the image endpoints that name a folder, a file or a device of the server.
_SERVER_FIELDS = ("generator_device",)


def body_names(app: Any, path: str) -> tuple[str, ...]:
    """Return the names that the body of a POST request may have, as vLLM-Omni declares them.

    Args:
        app: the FastAPI application.
        path: of the endpoint.
    """
    for route in app.routes:
        if getattr(route, "path", None) == path and "POST" in (route.methods or ()):
            fields = route.dependant.body_params
            models = [field.field_info.annotation for field in fields]
            if len(models) == 1 and isinstance(models[0], type) and issubclass(models[0], BaseModel):
                return tuple(models[0].model_fields)
            return tuple(field.alias for field in fields)
    raise LookupError(f"{path} is no endpoint of vLLM-Omni")


def check_json(given: dict[str, Any], names: Collection[str]) -> None:
    """Refuse a body with a name that the endpoint does not have."""
    _check_names(given, names)


async def check_image_form(form: Form, names: Collection[str], limits: Limits) -> None:
    """Check the form of ``/v1/images/edits``, and turn its URLs into files.

    Raises:
        Refusal: a name or a URL is not valid; InputError: an image is not.
    """
    _check_names([*form.fields, *(upload.field for upload in form.uploads)], names)
    if len(form.uploads) + len(form.urls) > MAX_REFERENCES:
        raise Refusal(400, f"[input_count] {len(form.uploads) + len(form.urls)} images; at most {MAX_REFERENCES}")
    fetcher = Fetcher(limits, limits.max_body)
    for url in form.urls:
        form.uploads.append(Upload("image", "image.png", io.BytesIO(await content_of(url, fetcher))))
    form.urls.clear()
    for number, upload in enumerate(form.uploads, 1):
        await check_picture(upload.file, name=f"image {number}")
        upload.file.seek(0)


def _check_names(given: Iterable[str], names: Collection[str]) -> None:
    allowed = [name for name in names if name not in (*URL_FIELDS, *_SERVER_FIELDS)]
    for name in given:
        if name not in allowed:
            near = difflib.get_close_matches(name[:80], allowed, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(allowed)}"
            raise Refusal(400, f"[input_value] the request has the unknown field {name[:80]!r}\nhint: {hint}")
