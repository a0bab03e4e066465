"""Images that are decoded when they are used."""

from __future__ import annotations

import io
import pickle
import tracemalloc

import numpy as np
import pytest
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

from port_kit.pipeline.images import load_image
from port_kit.serving.pictures import EncodedImage


def file(kind: str, mode: str) -> bytes:
    """Return a file with a picture of noise."""
    pixels = np.random.default_rng(0).integers(0, 255, (20, 30, 4), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("kind", "mode"), [("PNG", "1"), ("PNG", "P"), ("PNG", "RGBA"), ("PNG", "LA"), ("JPEG", "CMYK"), ("WEBP", "RGB")]
)
def test_the_pixels_are_those_of_the_file(kind: str, mode: str) -> None:
    content = file(kind, mode)
    wanted = Image.open(io.BytesIO(content)).convert("RGB")
    image = EncodedImage(content)
    assert (image.size, image.mode, image.format) == (wanted.size, "RGB", None)
    copy = pickle.loads(pickle.dumps(image))
    for found in (load_image(image), image.convert("L"), load_image(copy)):
        assert found.tobytes() == wanted.convert(found.mode).tobytes()
    assert image._im is None and copy._im is None, "nothing was kept"
    assert np.array_equal(np.asarray(image), np.asarray(wanted))
    assert image.resize((7, 5)).tobytes() == wanted.resize((7, 5)).tobytes()


def test_an_image_is_held_as_its_file() -> None:
    """A text of 1 MB takes 1 kB of a file."""
    texts = PngInfo()
    for number in range(20):
        texts.add_text(f"text {number}", "a" * 1_000_000, zip=True)
    buffer = io.BytesIO()
    Image.new("1", (2000, 2000)).save(buffer, "PNG", pnginfo=texts)
    content = buffer.getvalue()
    tracemalloc.start()
    try:
        held = [EncodedImage(content) for _ in range(8)]
        shown = {load_image(image).size for image in held}
        size = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert shown == {(2000, 2000)} and len(content) < 50_000
    assert size < 8 * 5_000, "the file itself is shared"
    assert all(image._im is None for image in held) and len(pickle.dumps(held)) < 2 * len(content)


def test_a_change_is_kept() -> None:
    image = EncodedImage(file("PNG", "RGB"))
    ImageDraw.Draw(image).rectangle((0, 0, 30, 20), fill="red")
    for found in (image, image.convert("RGB"), image.copy(), pickle.loads(pickle.dumps(image))):
        assert found.getcolors() == [(600, (255, 0, 0))]
