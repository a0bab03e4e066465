"""Requests for images and for audio alone: exact names, and images checked by content before they are decoded."""

from __future__ import annotations

import difflib
import io
import json
from collections.abc import Collection, Iterable
from typing import Any

from pydantic import BaseModel

from port_kit.escape import quoted
from port_kit.serving.asgi import Refusal
from port_kit.serving.fetch import Fetcher
from port_kit.serving.forms import FILE_OR_URL_FIELDS, URL_FIELDS, Form, Upload
from port_kit.serving.limits import Limits
from port_kit.serving.loras import resolve_lora
from port_kit.serving.pictures import check_picture
from port_kit.serving.references import content_of
from port_kit.serving.served import MAX_REFERENCES
from port_kit.serving.strict_json import parse_json

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


def check_json(given: dict[str, Any], names: Collection[str], limits: Limits) -> None:
    """Refuse a body with a name that the endpoint does not have, and find its LoRA.

    Raises:
        Refusal: a name or the LoRA is not valid.
    """
    _check_names(given, names)
    if given.get("lora") is not None:
        given["lora"] = resolve_lora(given["lora"], limits)


async def check_image_form(form: Form, names: Collection[str], limits: Limits) -> None:
    """Check the form of ``/v1/images/edits``, turn its URLs into files, and find its LoRA.

    Raises:
        Refusal: a name, a URL or the LoRA is not valid; InputError: an image is not.
    """
    _check_names([*form.fields, *(upload.field for upload in form.uploads)], names)
    if "lora" in form.fields:
        form.fields["lora"] = json.dumps(resolve_lora(parse_json(form.fields["lora"], "lora"), limits))
    single = [(name, form.fields.pop(name)) for name in FILE_OR_URL_FIELDS if name in form.fields]
    urls = [*(("image", url) for url in form.urls), *single]
    count = len(form.uploads) + len(urls)
    if count > MAX_REFERENCES:
        raise Refusal(400, f"[input_count] {count} images; at most {MAX_REFERENCES}")
    fetcher = Fetcher(limits, limits.max_body)
    for name, url in urls:
        form.uploads.append(Upload(name, "image.png", io.BytesIO(await content_of(url, fetcher))))
    form.urls.clear()
    for number, upload in enumerate(form.uploads, 1):
        await check_picture(upload.file, name=f"image {number}")
        upload.file.seek(0)


def _check_names(given: Iterable[str], names: Collection[str]) -> None:
    allowed = [name for name in names if name not in (*URL_FIELDS, *_SERVER_FIELDS)]
    for name in given:
        if name not in allowed:
            near = difflib.get_close_matches(name[:80], allowed, n=1)
            hint = f"did you mean {quoted(near[0])}?" if near else f"known are {', '.join(allowed)}"
            raise Refusal(400, f"[input_value] the request has the unknown field {quoted(name)}\nhint: {hint}")
