"""A first frame and a prompt to a server of MOVA; a video with audio comes back.

python client.py --image first_frame.png --prompt "She plays the violin. Steady rain." --output rain.mp4
python client.py --sample first_frame.png     # writes a drawn street there, to try it with
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1] / "offline_inference" / "mova")]

from video_client import ask, form_of, request_parser, upload  # noqa: E402

from port_kit.models.mova import PORT  # noqa: E402

#: Fields of the form beside those of all clients.
FIELDS: dict[str, type] = {"negative_prompt": str, "num_frames": int, "guidance_scale": float}


def main() -> int:
    """Ask for one video and write it; return 1 if the server refused."""
    parser = request_parser(__doc__ or "", {}, "mova.mp4")
    for name, kind in FIELDS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=None)
    parser.add_argument("--image", default=None, help="the first frame: PNG, JPEG or WebP")
    parser.add_argument("--sample", metavar="FILE", help="write a first frame to try it with, and stop")
    arguments = parser.parse_args()
    if arguments.sample:
        from generate_mova import street

        street().save(arguments.sample)
        return 0
    arguments.prompt = arguments.prompt or PORT.example_prompt
    files = [("input_reference", upload(arguments.image))] if arguments.image else []
    own = {name: getattr(arguments, name) for name in FIELDS if getattr(arguments, name) is not None}
    return ask(arguments, {**form_of(arguments, {}), **own}, files)


if __name__ == "__main__":
    raise SystemExit(main())
