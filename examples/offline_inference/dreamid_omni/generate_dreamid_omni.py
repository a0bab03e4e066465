"""Reference images, reference audios and a prompt to a video with audio: ``port-kit generate dreamid_omni``.

python generate_dreamid_omni.py --model DIR --images a.png b.png --voices a.wav b.wav --prompt "..." -o out.mp4

Without ``--images`` and ``--voices`` it uses two drawn faces and two synthetic voices. All options: ``--help``.
"""

import sys

import numpy as np
from PIL import Image, ImageDraw

from port_kit.cli.generate import run
from port_kit.models.dreamid_omni import PORT

RATE = 16_000  # Hz


def face(skin: tuple[int, int, int], hair: tuple[int, int, int]) -> Image.Image:
    """Draw a simple face, 192 x 256."""
    image = Image.new("RGB", (192, 256), (164, 190, 208))
    draw = ImageDraw.Draw(image)
    draw.ellipse((30, 24, 162, 220), fill=hair)
    draw.ellipse((46, 52, 146, 206), fill=skin)
    draw.rectangle((0, 220, 192, 256), fill=(70, 80, 110))
    for x in (74, 118):
        draw.ellipse((x - 9, 108, x + 9, 122), fill="white")
        draw.ellipse((x - 4, 110, x + 4, 120), fill=(40, 30, 30))
    draw.arc((72, 150, 120, 182), 15, 165, fill=(150, 60, 60), width=4)
    return image


def hum(pitch: float, seconds: float = 2.5, rate: int = RATE) -> np.ndarray:
    """Hum at ``pitch`` Hz: harmonics with vibrato and a breath's envelope, float32 (samples,)."""
    time_s = np.arange(int(seconds * rate)) / rate
    phase = 2 * np.pi * (pitch * time_s + 0.6 * np.sin(2 * np.pi * 5.0 * time_s))
    tone = sum(np.sin(k * phase) / k**1.4 for k in range(1, 9))
    return (0.25 * tone * (0.6 + 0.4 * np.sin(2 * np.pi * 1.3 * time_s))).astype(np.float32)


DEFAULT_MEDIA = {
    "image": lambda: [face((224, 176, 148), (92, 60, 44)), face((198, 148, 116), (38, 34, 40))],
    "audio": lambda: [(hum(215.0), RATE), (hum(118.0), RATE)],
}

if __name__ == "__main__":
    raise SystemExit(run(PORT, sys.argv[1:], DEFAULT_MEDIA))
