"""A first frame and a prompt to a video with audio: ``port-kit generate mova``.

python generate_mova.py --model DIR --image first_frame.png --prompt "..." -o out.mp4

Without ``--image`` it uses a drawn street. All options: ``--help``.
"""

import sys

from PIL import Image, ImageDraw

from port_kit.cli.generate import run
from port_kit.models.mova import PORT


def street() -> Image.Image:
    """Draw a street in the rain, 1280 x 720."""
    image = Image.new("RGB", (1280, 720), (96, 110, 128))
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 470, 1280, 720), fill=(62, 64, 70))
    for index, color in enumerate(((142, 96, 78), (168, 150, 120), (112, 118, 134))):
        left = 430 * index
        draw.rectangle((left, 140, left + 400, 480), fill=color)
        for x in range(left + 40, left + 380, 90):
            draw.rectangle((x, 190, x + 50, 260), fill=(226, 206, 150))
    draw.polygon(((360, 330), (820, 330), (900, 400), (280, 400)), fill=(170, 50, 54))
    draw.ellipse((560, 350, 640, 440), fill=(224, 176, 148))
    draw.rectangle((545, 435, 655, 640), fill=(54, 66, 96))
    draw.line((500, 520, 690, 455), fill=(120, 70, 40), width=14)
    for x in range(-200, 1280, 36):
        draw.line((x, 0, x + 180, 720), fill=(150, 162, 178), width=1)
    return image


if __name__ == "__main__":
    raise SystemExit(run(PORT, sys.argv[1:], {"image": lambda: [street()]}))
