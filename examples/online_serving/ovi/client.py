"""A prompt, and a first frame where one is given, to a server of Ovi; a video with sound comes back.

python client.py --prompt "... She says, <S>One more song.<E> Audio: violin, rain." --output song.mp4
python client.py --image first_frame.png --prompt "..." --output song.mp4
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent)]

from video_client import ask, form_of, request_parser, upload  # noqa: E402

PROMPT = (
    "She plays a violin in the rain, looks up and says, <S>One more song.<E> Audio: violin, steady rain, a clear voice."
)
OPTIONS: dict[str, type] = {
    **dict.fromkeys(("video_negative_prompt", "audio_negative_prompt", "solver_name", "uncond_skip_layers"), str),
    **dict.fromkeys(("shift", "video_guidance_scale", "audio_guidance_scale", "slg_start", "slg_stop"), float),
    "slg_layer": int,
}


def main() -> int:
    """Ask for one video and write it; return 1 where the server refused."""
    parser = request_parser(__doc__ or "", OPTIONS, "ovi.mp4")
    parser.add_argument("--image", default=None, help="the first frame; it gives the video's ratio")
    arguments = parser.parse_args()
    arguments.prompt = arguments.prompt or PROMPT
    files = [("input_reference", upload(arguments.image))] if arguments.image else []
    return ask(arguments, form_of(arguments, OPTIONS), files)


if __name__ == "__main__":
    raise SystemExit(main())
