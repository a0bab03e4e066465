"""Reference pictures, voices and a prompt to a server of DreamID-Omni; a video with sound comes back.

python client.py --images anna.png ben.jpg --voices anna.wav ben.wav --prompt "..." --output talk.mp4
python client.py --samples samples     # writes two drawn faces and two hums there, to try it with
"""

from __future__ import annotations

import argparse
import json
import sys
import wave
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1] / "offline_inference" / "dreamid_omni")]

from video_client import RefusedError, VideoClient, upload  # noqa: E402

TINY = {"height": 64, "width": 96, "num_inference_steps": 4}
#: Options that the form has no field for; they travel in its field extra_params, a JSON object.
EXTRA = {
    **dict.fromkeys(("video_negative_prompt", "audio_negative_prompt", "solver_name"), str),
    **dict.fromkeys(
        ("shift", "video_cfg_scale", "video_ref_cfg_scale", "audio_cfg_scale", "audio_ref_cfg_scale"), float
    ),
}


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", default="http://127.0.0.1:8000")
    parser.add_argument("--images", nargs="+", default=[], help="one picture a person: PNG, JPEG, WebP")
    parser.add_argument(
        "--voices", nargs="+", default=[], help="one voice a person, in that order: WAV or MP3, 2 s or longer"
    )
    parser.add_argument("--prompt", default=None)
    parser.add_argument("-o", "--output", default="dreamid_omni.mp4")
    parser.add_argument("--sync", action="store_true", help="one request that stays open, instead of a job")
    parser.add_argument("--tiny", action="store_true", help=f"for the tiny checkpoint: {TINY}")
    parser.add_argument("--samples", metavar="DIR", help="write references to try it with, and stop")
    request = parser.add_argument_group("request (defaults are the model's)")
    for name in ("height", "width", "num-inference-steps", "seed"):
        request.add_argument(f"--{name}", type=int, default=None)
    for name, kind in EXTRA.items():
        request.add_argument(f"--{name.replace('_', '-')}", type=kind, default=None)
    return parser.parse_args()


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


def example_prompt() -> str:
    """Return the offline example's prompt, for two people."""
    from generate_dreamid_omni import PROMPT

    return PROMPT


def form(arguments: argparse.Namespace) -> dict[str, object]:
    """Return the fields of the form; what is not given is left to the model."""
    fields: dict[str, object] = dict(TINY) if arguments.tiny else {}
    for name in ("height", "width", "num_inference_steps", "seed"):
        if getattr(arguments, name) is not None:
            fields[name] = getattr(arguments, name)
    extra = {name: getattr(arguments, name) for name in EXTRA if getattr(arguments, name) is not None}
    if extra:
        fields["extra_params"] = json.dumps(extra)
    return fields


def main() -> int:
    """Ask for one video and write it; return 1 where the server refused."""
    arguments = parse_arguments()
    if arguments.samples:
        write_samples(Path(arguments.samples))
        return 0
    fields = {"prompt": arguments.prompt or example_prompt(), **form(arguments)}
    files = [upload(path) for path in (*arguments.images, *arguments.voices)]
    client = VideoClient(arguments.server)
    try:
        if arguments.sync:
            video = client.generate(fields, files)
        else:
            video = client.run(fields, files)
    except RefusedError as error:
        print(error, file=sys.stderr)
        return 1
    Path(arguments.output).write_bytes(video)
    print(f"{arguments.output}: {len(video)} bytes")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
