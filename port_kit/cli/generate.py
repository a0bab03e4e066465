"""``port-kit generate PORT``: one request through vLLM-Omni's offline engine, written as MP4, PNG or WAV."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from port_kit.cli.engine_logs import set_engine_logs
from port_kit.cli.output import error_text, handles_errors
from port_kit.parallel.layout import ULYSSES_MODES
from port_kit.port import HostedPort, Port
from port_kit.registry import find_port

#: Types of :attr:`~port_kit.port.Port.request_options` on the command line.
TYPES: Mapping[str, type] = {"str": str, "int": int, "float": float}
#: Fields of ``OmniDiffusionSamplingParams`` on the command line, beside the seed.
SAMPLING = ("height", "width", "num_frames", "num_inference_steps", "guidance_scale")
#: Suffix of the output, by :attr:`~port_kit.port.Port.output_type`.
SUFFIXES = {"video": "mp4", "image": "png", "audio": "wav"}
PARALLEL_DEGREES = ("tensor_parallel_size", "ulysses_degree", "ring_degree", "cfg_parallel_size")
PARALLEL_OPTIONS = ("ulysses_mode", "use_hsdp", "hsdp_shard_size", "hsdp_replicate_size")
ENGINE_OPTIONS = (
    "dtype",
    "enforce_eager",
    "cache_backend",
    "enable_cpu_offload",
    "enable_layerwise_offload",
    "quantization",
)
#: Command-line names of the conditioning media.
MEDIA_OPTIONS = {
    "image": ("--images", "--image", "--image-path"),
    "audio": ("--audios", "--voices", "--audio-path"),
}


def build_parser(port: Port) -> argparse.ArgumentParser:
    """Return the parser of a port's options; engine options have vLLM-Omni's names."""
    parser = argparse.ArgumentParser(prog=f"port-kit generate {port.name}", description=port.title)
    parser.add_argument("--model", required=True, help=f"model directory, made by: port-kit download {port.name}")
    parser.add_argument("-o", "--output", default=f"{port.name}.{SUFFIXES[port.output_type]}")
    parser.add_argument("--contact-sheet", default=None, help="also draw frames and waveform into this PNG")
    parser.add_argument("--prompt", default=port.example_prompt or None)
    parser.add_argument("--prompt-file", default=None, help="JSON file that holds the prompt as one string")
    parser.add_argument("--tiny", action="store_true", help=f"settings of the tiny checkpoint: {dict(port.tiny)}")
    parser.add_argument("-v", "--verbose", action="count", default=0, help="show the logs of vLLM-Omni's processes")
    for kind in port.references:
        parser.add_argument(*MEDIA_OPTIONS[kind], dest=kind, nargs="+", default=None, help=f"{kind} files")

    request = parser.add_argument_group("request (defaults are the model's)")
    request.add_argument("--negative-prompt", default=None)
    for name in SAMPLING:
        number = float if name == "guidance_scale" else int
        request.add_argument(f"--{name.replace('_', '-')}", type=number, default=None)
    request.add_argument("--seed", type=int, default=port.seed)
    request.add_argument("--num-outputs", type=int, default=1, help="output i has the seed plus i")
    for name, option in port.request_options.items():
        request.add_argument(f"--{name.replace('_', '-')}", type=TYPES[option], default=None)

    engine = parser.add_argument_group("engine (passed to vLLM-Omni)")
    engine.add_argument("--dtype", default="bfloat16")
    for name in PARALLEL_DEGREES:
        engine.add_argument(f"--{name.replace('_', '-')}", type=int, default=1)
    engine.add_argument("--ulysses-mode", default=None, choices=ULYSSES_MODES, help="advanced_uaa: pad uneven heads")
    engine.add_argument("--use-hsdp", action="store_true")
    engine.add_argument("--hsdp-shard-size", type=int, default=None)
    engine.add_argument("--hsdp-replicate-size", type=int, default=None)
    engine.add_argument("--enforce-eager", action="store_true", help="do not compile")
    engine.add_argument("--cache-backend", default=None, choices=["cache_dit", "tea_cache"])
    engine.add_argument("--enable-cpu-offload", action="store_true")
    engine.add_argument("--enable-layerwise-offload", action="store_true")
    engine.add_argument("--quantization", default=None, help="fp8: quantize weights to eight bits while loading")
    return parser


def engine_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of ``Omni``."""
    given = vars(arguments)
    parallel = {name: given[name] for name in (*PARALLEL_DEGREES, *PARALLEL_OPTIONS) if given[name] is not None}
    options = {name: given[name] for name in ENGINE_OPTIONS if given[name]}
    return {"model": arguments.model, **parallel, **options}


def build_request(
    port: Port, arguments: argparse.Namespace, default_media: Mapping[str, Callable[[], Any]] | None = None
) -> tuple[dict[str, Any], Any]:
    """Return the prompt and ``OmniDiffusionSamplingParams``; options that are not given keep the model's defaults.

    Args:
        port: the port.
        arguments: of :func:`build_parser`.
        default_media: per kind, a function that makes the media of a request that names none.
    """
    from vllm_omni.inputs.data import OmniDiffusionSamplingParams

    given = {name: value for name, value in vars(arguments).items() if value is not None}
    sampling = dict(port.tiny) if arguments.tiny else {}
    sampling |= {name: given[name] for name in (*SAMPLING, "seed") if name in given}
    if "guidance_scale" in sampling:
        sampling["guidance_scale_provided"] = True
    extra = dict(sampling.pop("extra_args", {}))
    extra |= {name: given[name] for name in port.request_options if name in given}
    text = arguments.prompt
    if arguments.prompt_file:
        text = json.loads(Path(arguments.prompt_file).read_text(encoding="utf-8"))
    media = {kind: given[kind] for kind in port.references if kind in given}
    for kind, make in (default_media or {}).items():
        media.setdefault(kind, make())
    prompt: dict[str, Any] = {"prompt": text}
    if "negative_prompt" in given:
        prompt["negative_prompt"] = given["negative_prompt"]
    if media:
        prompt["multi_modal_data"] = media
    return prompt, OmniDiffusionSamplingParams(
        extra_args=extra, num_outputs_per_prompt=arguments.num_outputs, **sampling
    )


def run(port: Port, options: Sequence[str], default_media: Mapping[str, Callable[[], Any]] | None = None) -> int:
    """Generate the outputs of one request and print the properties of the files; return the exit code."""
    arguments = build_parser(port).parse_args(options)
    set_engine_logs(arguments.verbose, override=bool(arguments.verbose))
    # An engine in this process prefixes every line with its name: duplicate the descriptors before.
    stdout, stderr = (os.fdopen(os.dup(stream.fileno()), "w") for stream in (sys.stdout, sys.stderr))
    from port_kit.pipeline.media import describe_file
    from port_kit.pipeline.model_index import ModelIndex
    from port_kit.reports import draw_contact_sheet
    from port_kit.runtime.refusals import refusal_of

    try:
        ModelIndex.read(arguments.model).text("_class_name")
        prompt, sampling = build_request(port, arguments, default_media)
        print("starting the engine", file=stderr, flush=True)
        result, start, seconds = _generate(arguments, prompt, sampling)
    except Exception as error:
        refusal = refusal_of(error)
        if refusal is None and not isinstance(error, ValueError):
            raise
        print(error if refusal is None else error_text(refusal), file=stderr, flush=True)
        return 1
    paths = _write(port, Path(arguments.output), result)
    for index, path in enumerate(paths):
        # outputs of a hosted pipeline share one generator
        seed = sampling.seed + (0 if isinstance(port, HostedPort) else index)
        facts = f"{describe_file(path)}, seed {seed}, engine started in {start:.1f} s, generated in {seconds:.1f} s"
        print(facts, file=stdout, flush=True)
    if arguments.contact_sheet:
        print(f"frames and waveform: {draw_contact_sheet(paths[0], arguments.contact_sheet)}", file=stdout, flush=True)
    return 0


def _generate(arguments: argparse.Namespace, prompt: Any, sampling: Any) -> tuple[Any, float, float]:
    """Run one request; return its result, the seconds of the engine's start, and those of the request."""
    from vllm_omni import Omni

    from port_kit.runtime.refusals import hide_tracebacks_of_refusals

    hide_tracebacks_of_refusals()
    began = time.perf_counter()
    omni = Omni(**engine_options(arguments))
    try:
        started = time.perf_counter()
        # A generator raises the error of a refused request without closing the engine.
        (result,) = omni.generate(prompt, sampling, py_generator=True, use_tqdm=bool(arguments.verbose))
        return result, started - began, time.perf_counter() - started
    finally:
        omni.close()


def _write(port: Port, path: Path, result: Any) -> list[Path]:
    """Write the outputs of a result; a hosted pipeline may return several channels of audio."""
    if isinstance(port, HostedPort):
        from port_kit.autoparallel.host.files import write_files

        return write_files(path, result, port.output_type)
    from port_kit.pipeline.media import write_result

    return write_result(path, result)


@click.command(
    "generate",
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
    epilog='Examples:  port-kit generate ovi --model DIR --prompt "rain on a roof" -o rain.mp4  |  '
    "port-kit generate dreamid_omni --help",
)
@click.argument("port")
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
@handles_errors("generate")
def command(port: str, options: tuple[str, ...]) -> None:
    """Run one request on a port's model directory and write a video as MP4, an image, or audio as WAV.

    OPTIONS depend on the port: port-kit generate PORT --help.
    """
    raise SystemExit(run(find_port(port), options))
