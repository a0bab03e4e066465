"""Reference pictures, voices and a prompt to a server of DreamID-Omni; a video with sound comes back.

python client.py --images anna.png ben.jpg --voices anna.wav ben.wav --prompt "..." --output talk.mp4
python client.py --samples samples     # writes two drawn faces and two hums there, to try it with
"""

from __future__ import annotations

import sys
import wave
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1] / "offline_inference" / "dreamid_omni")]

from video_client import ask, form_of, request_parser, upload  # noqa: E402

from port_kit.models.dreamid_omni import PORT  # noqa: E402

OPTIONS: dict[str, type] = {
    **dict.fromkeys(("video_negative_prompt", "audio_negative_prompt", "solver_name"), str),
    **dict.fromkeys(("shift", "video_cfg_scale", "video_ref_cfg_scale"), float),
    **dict.fromkeys(("audio_cfg_scale", "audio_ref_cfg_scale"), float),
}


def write_samples(folder: Path) -> None:
    """Write ``a.png``, ``b.png``, ``a.wav`` and ``b.wav``."""
    from generate_dreamid_omni import face, hum

    folder.mkdir(parents=True, exist_ok=True)
    people = {"a": ((224, 176, 148), (92, 60, 44), 215.0), "b": ((198, 148, 116), (38, 34, 40), 118.0)}
    for name, (skin, hair, pitch) in people.items():
        face(skin, hair).save(folder / f"{name}.png")
        with wave.open(str(folder / f"{name}.wav"), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(16_000)
            file.writeframes((hum(pitch) * 32767).astype("<i2").tobytes())
        print(f"{folder / name}.png {folder / name}.wav")


def main() -> int:
    """Ask for one video and write it; return 1 where the server refused."""
    parser = request_parser(__doc__ or "", OPTIONS, "dreamid_omni.mp4")
    parser.add_argument("--images", nargs="+", default=[], help="one picture a person: PNG, JPEG or WebP")
    parser.add_argument(
        "--voices",
        nargs="+",
        default=[],
        help="one voice a person, in that order: WAV, MP3, FLAC, Ogg or MP4, 2 s or more",
    )
    parser.add_argument("--samples", metavar="DIR", help="write references to try it with, and stop")
    arguments = parser.parse_args()
    if arguments.samples:
        write_samples(Path(arguments.samples))
        return 0
    arguments.prompt = arguments.prompt or PORT.example_prompt
    files = [("input_references", upload(path)) for path in (*arguments.images, *arguments.voices)]
    return ask(arguments, form_of(arguments, OPTIONS), files)


if __name__ == "__main__":
    raise SystemExit(main())
