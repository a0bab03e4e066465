"""Reference pictures, reference voices and a prompt to a video with sound, through vLLM-Omni's own engine.

    python generate_dreamid_omni.py --model DIR --images a.png b.png --voices a.wav b.wav --prompt "..." -o out.mp4

Without pictures and voices it draws two faces and hums two voices. ``--tiny`` sets a size and a number of steps for the
tiny checkpoint of ``download_dreamid_omni.py --tiny``; lengths stay the model's own: 121 frames, 5 s of sound.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

HERE = Path(__file__).parent
PROMPT = (
    "<img1>: In the frame, a woman is identified as <sub1>. <img2>: In the frame, a man is identified as <sub2>. "
    "<sub1> and <sub2> sit at a table by a window. <sub1> smiles and says, <S>Hello there, my old friend.<E> "
    "<sub2> looks up and answers, <S>It has been far too long.<E>"
)
TINY = {"height": 64, "width": 96, "num_inference_steps": 4}


def parse_arguments() -> argparse.Namespace:
    """Read the command line; engine options have vLLM-Omni's names and reach ``Omni`` unchanged."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="model directory made by download_dreamid_omni.py")
    parser.add_argument("-o", "--output", default="dreamid_omni.mp4")
    parser.add_argument("--picture", default=None, help="also draw frames and waveform of the file into this PNG")
    parser.add_argument("--images", "--image-path", nargs="+", help="one picture a person")
    parser.add_argument("--voices", "--audio-path", nargs="+", help="one voice a person, 2 s or longer, in that order")
    parser.add_argument("--prompt", default=None)
    parser.add_argument("--prompt-file", default=None, help="JSON file that holds the prompt as one string")
    parser.add_argument("--tiny", action="store_true", help=f"for the tiny checkpoint: {TINY}")

    request = parser.add_argument_group("request (defaults are the model's)")
    request.add_argument("--height", type=int, default=None, help="pixels, a multiple of 32 (704)")
    request.add_argument("--width", type=int, default=None, help="pixels, a multiple of 32 (1280)")
    request.add_argument("--num-inference-steps", type=int, default=None, help="(50)")
    request.add_argument(
        "--num-outputs", type=int, default=1, help="videos; the i-th after the first has the seed plus i"
    )
    request.add_argument("--seed", type=int, default=100)
    for name in ("video-negative-prompt", "audio-negative-prompt", "solver-name"):
        request.add_argument(f"--{name}", default=None)
    for name in ("shift", "video-cfg-scale", "video-ref-cfg-scale", "audio-cfg-scale", "audio-ref-cfg-scale"):
        request.add_argument(f"--{name}", type=float, default=None)

    engine = parser.add_argument_group("engine (passed to vLLM-Omni)")
    engine.add_argument("--dtype", default="bfloat16")
    for name in ("tensor-parallel-size", "ulysses-degree", "ring-degree", "cfg-parallel-size"):
        engine.add_argument(f"--{name}", type=int, default=1)
    engine.add_argument("--use-hsdp", action="store_true")
    engine.add_argument("--hsdp-shard-size", type=int, default=None)
    engine.add_argument("--hsdp-replicate-size", type=int, default=None)
    engine.add_argument("--enforce-eager", action="store_true", help="do not compile")
    engine.add_argument("--cache-backend", default=None, choices=["cache_dit", "tea_cache"])
    engine.add_argument("--enable-cpu-offload", action="store_true")
    engine.add_argument("--enable-layerwise-offload", action="store_true")
    engine.add_argument("--quantization", default=None, help="fp8: eight-bit weights, made while loading")
    return parser.parse_args()


def engine_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what is handed to ``Omni``."""
    from vllm_omni.diffusion.data import DiffusionParallelConfig

    parallel = {
        name: getattr(arguments, name)
        for name in (
            "tensor_parallel_size",
            "ulysses_degree",
            "ring_degree",
            "cfg_parallel_size",
            "use_hsdp",
            "hsdp_shard_size",
            "hsdp_replicate_size",
        )
        if getattr(arguments, name) is not None
    }
    options = {
        name: getattr(arguments, name)
        for name in (
            "dtype",
            "enforce_eager",
            "cache_backend",
            "enable_cpu_offload",
            "enable_layerwise_offload",
            "quantization",
        )
        if getattr(arguments, name)
    }
    return {"model": arguments.model, "parallel_config": DiffusionParallelConfig(**parallel), **options}


def request_of(arguments: argparse.Namespace) -> tuple[dict[str, Any], Any]:
    """Return the prompt and the sampling parameters; what is not given is left to the model."""
    from vllm_omni.inputs.data import OmniDiffusionSamplingParams

    sampling = dict(TINY) if arguments.tiny else {}
    for name in ("height", "width", "num_inference_steps"):
        if getattr(arguments, name) is not None:
            sampling[name] = getattr(arguments, name)
    extra = {
        name: getattr(arguments, name)
        for name in (
            "video_negative_prompt",
            "audio_negative_prompt",
            "solver_name",
            "shift",
            "video_cfg_scale",
            "video_ref_cfg_scale",
            "audio_cfg_scale",
            "audio_ref_cfg_scale",
        )
        if getattr(arguments, name) is not None
    }
    text = arguments.prompt or PROMPT
    if arguments.prompt_file:
        text = json.loads(Path(arguments.prompt_file).read_text(encoding="utf-8"))
    pictures = arguments.images or [face((224, 176, 148), (92, 60, 44)), face((198, 148, 116), (38, 34, 40))]
    voices = arguments.voices or [(hum(215.0), 16_000), (hum(118.0), 16_000)]
    prompt = {"prompt": text, "multi_modal_data": {"image": pictures, "audio": voices}}
    sampling |= {"seed": arguments.seed, "num_outputs_per_prompt": arguments.num_outputs}
    return prompt, OmniDiffusionSamplingParams(extra_args=extra, **sampling)


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


def hum(pitch: float, seconds: float = 2.5, rate: int = 16_000) -> np.ndarray:
    """Hum at ``pitch`` Hz: harmonics with vibrato and a breath's envelope, float32 (samples,)."""
    time_s = np.arange(int(seconds * rate)) / rate
    phase = 2 * np.pi * (pitch * time_s + 0.6 * np.sin(2 * np.pi * 5.0 * time_s))
    tone = sum(np.sin(k * phase) / k**1.4 for k in range(1, 9))
    return (0.25 * tone * (0.6 + 0.4 * np.sin(2 * np.pi * 1.3 * time_s))).astype(np.float32)


def main() -> int:
    """Generate one video and say what is in the file."""
    arguments = parse_arguments()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    # An engine that runs in this process puts its name before every line on stdout: keep a way around it.
    stdout = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    from vllm_omni import Omni

    from port_kit.pipeline.media import measure_mp4, write_result
    from port_kit.reports import picture_of_clip

    prompt, sampling = request_of(arguments)
    omni = Omni(**engine_options(arguments))
    try:
        started = time.perf_counter()
        # As a generator: a refused request is then one error of its own and not the end of the engine.
        (result,) = omni.generate(prompt, sampling, py_generator=True)
        seconds = time.perf_counter() - started
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    finally:
        omni.close()
    paths = write_result(arguments.output, result)
    for path in paths:
        print(f"{measure_mp4(path).line(path)}, generated in {seconds:.1f} s", file=stdout, flush=True)
    if arguments.picture:
        print(f"frames and waveform: {picture_of_clip(paths[0], arguments.picture)}", file=stdout, flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
