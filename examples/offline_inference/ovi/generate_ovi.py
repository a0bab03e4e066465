"""A prompt, and an optional first frame, to a video with audio: ``port-kit generate ovi``.

python generate_ovi.py --model DIR --prompt "..." [--image first_frame.png] -o out.mp4     # all options: --help
"""

import sys

from port_kit.cli.generate import run
from port_kit.models.ovi import PORT

if __name__ == "__main__":
    raise SystemExit(run(PORT, sys.argv[1:]))
