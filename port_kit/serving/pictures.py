"""Reference images that are decoded when they are used, and not while their request waits.

vLLM-Omni's server decodes every image when a request arrives, in the thread that serves all clients, and keeps the
pixels until the request has been answered: 130 MB for an image of :data:`~port_kit.references.MAX_PIXELS`, whatever the
size of its file.
"""

from __future__ import annotations

import asyncio
import io
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, BinaryIO

from PIL import Image

from port_kit.pipeline.images import load_image
from port_kit.references import IMAGE_FORMATS

#: One thread decodes for all clients: threads would not be faster, and each would keep the memory of a picture.
_DECODER = ThreadPoolExecutor(1, thread_name_prefix="pictures")


class EncodedImage(Image.Image):
    """An RGB image that holds the bytes of its file.

    :meth:`convert` decodes anew and keeps nothing; any other use of its pixels decodes it for good.

    Args:
        content: of a file that was decoded before without an error.
    """

    def __init__(self, content: bytes) -> None:
        super().__init__()
        self._content = content
        with self._open() as opened:
            self._mode, self._size = "RGB", opened.size  # texts in info may be far larger than the file

    def load(self) -> Any:
        """Decode the image, as Pillow's images of files do."""
        if self._im is None:
            self.im = self.convert("RGB").im
        return super().load()

    def convert(self, mode: str | None = None, *arguments: Any, **keywords: Any) -> Image.Image:
        """Return a converted copy."""
        if self._im is not None:
            return super().convert(mode, *arguments, **keywords)
        with self._open() as opened:
            decoded = opened.convert("RGB")
        return decoded if mode in (None, "RGB") else decoded.convert(mode, *arguments, **keywords)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the bytes of the file; an image that was decoded is pickled as any other."""
        return (EncodedImage, (self._content,)) if self._im is None else (Image.Image.copy, (self.copy(),))

    def _open(self) -> Image.Image:
        return Image.open(io.BytesIO(self._content), formats=IMAGE_FORMATS)


async def check_picture(source: bytes | BinaryIO, *, name: str) -> None:
    """Decode a reference image once, so that a damaged one is refused on arrival.

    Raises:
        InputError: it cannot be decoded, or is not within the bounds.
    """
    await asyncio.get_running_loop().run_in_executor(_DECODER, partial(load_image, source, name=name))


def decode_pictures_late(video_api_utils: Any, helpers: Any) -> None:
    """Replace vLLM-Omni's function that decodes the images of requests for videos, in the modules that use it."""

    def encoded(image_bytes: bytes, *, source: str) -> EncodedImage:
        image = EncodedImage(image_bytes)
        video_api_utils._validate_image_pixel_limit(image)
        return image

    for module in (video_api_utils, helpers):
        module._decode_image_bytes = encoded
