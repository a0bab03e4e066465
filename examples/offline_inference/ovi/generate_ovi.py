"""A prompt, and a first frame where one is given, to a video with sound, through vLLM-Omni's own engine.

    python generate_ovi.py --model DIR --prompt "..." [--image first_frame.png] -o out.mp4

``--tiny`` sets a number of steps for the tiny checkpoint of ``download_ovi.py --tiny``; lengths stay the model's own.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from typing import Any

PROMPT = (
    "A street musician plays a violin under an awning while it rains. She looks up, smiles and says, "
    "<S>One more song before the train comes.<E> Audio: violin, steady rain, a clear female voice."
)
TINY = {"num_inference_steps": 4}
EXTRA = {
    "solver_name": str,
    "video_negative_prompt": str,
    "audio_negative_prompt": str,
    "shift": float,
    "video_guidance_scale": float,
    "audio_guidance_scale": float,
    "slg_layer": int,
}
DEGREES = ("tensor_parallel_size", "ulysses_degree", "ring_degree", "cfg_parallel_size")


def parse_arguments() -> argparse.Namespace:
    """Read the command line; engine options have vLLM-Omni's names and reach ``Omni`` unchanged."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="model directory made by download_ovi.py")
    parser.add_argument("-o", "--output", default="ovi.mp4")
    parser.add_argument("--picture", default=None, help="also draw frames and waveform of the file into this PNG")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--image", "--image-path", default=None, help="the first frame; it gives the video's ratio")
    parser.add_argument("--tiny", action="store_true", help=f"for the tiny checkpoint: {TINY}")

    request = parser.add_argument_group("request (defaults are the model's)")
    request.add_argument("--height", type=int, default=None, help="with --width the video's ratio (512)")
    request.add_argument("--width", type=int, default=None, help="(992)")
    request.add_argument("--num-inference-steps", type=int, default=None, help="(50)")
    request.add_argument(
        "--num-outputs", type=int, default=1, help="videos; the i-th after the first has the seed plus i"
    )
    request.add_argument("--seed", type=int, default=103)
    for name, kind in EXTRA.items():
        request.add_argument(f"--{name.replace('_', '-')}", type=kind, default=None)

    engine = parser.add_argument_group("engine (passed to vLLM-Omni)")
    engine.add_argument("--dtype", default="bfloat16")
    for name in DEGREES:
        engine.add_argument(f"--{name.replace('_', '-')}", type=int, default=1)
    engine.add_argument("--use-hsdp", action="store_true")
    engine.add_argument("--hsdp-shard-size", type=int, default=None)
    engine.add_argument("--hsdp-replicate-size", type=int, default=None)
    engine.add_argument("--enforce-eager", action="store_true", help="do not compile")
    engine.add_argument("--cache-backend", default=None, choices=["cache_dit"])
    engine.add_argument("--enable-cpu-offload", action="store_true")
    engine.add_argument("--enable-layerwise-offload", action="store_true")
    engine.add_argument("--quantization", default=None, help="fp8: eight-bit weights, made while loading")
    return parser.parse_args()


def engine_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what is handed to ``Omni``."""
    from vllm_omni.diffusion.data import DiffusionParallelConfig

    given = vars(arguments)
    sharding = ("use_hsdp", "hsdp_shard_size", "hsdp_replicate_size")
    parallel = {name: given[name] for name in (*DEGREES, *sharding) if given[name] is not None}
    rest = ("dtype", "enforce_eager", "cache_backend", "enable_cpu_offload", "enable_layerwise_offload", "quantization")
    options = {name: given[name] for name in rest if given[name]}
    return {"model": arguments.model, "parallel_config": DiffusionParallelConfig(**parallel), **options}


def request_of(arguments: argparse.Namespace) -> tuple[dict[str, Any], Any]:
    """Return the prompt and the sampling parameters; what is not given is left to the model."""
    from vllm_omni.inputs.data import OmniDiffusionSamplingParams

    given = {name: value for name, value in vars(arguments).items() if value is not None}
    sampling = dict(TINY) if arguments.tiny else {}
    sampling |= {name: given[name] for name in ("height", "width", "num_inference_steps") if name in given}
    extra = {name: given[name] for name in EXTRA if name in given}
    prompt: dict[str, Any] = {"prompt": arguments.prompt}
    if arguments.image:
        prompt["multi_modal_data"] = {"image": arguments.image}
    sampling |= {"seed": arguments.seed, "num_outputs_per_prompt": arguments.num_outputs}
    return prompt, OmniDiffusionSamplingParams(extra_args=extra, **sampling)


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
