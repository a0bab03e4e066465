"""``port-kit generate PORT``: clips through vLLM-Omni's offline engine, written as MP4, PNG or WAV."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import click

from port_kit.cli.clip_jobs import NUMERIC_OPTIONS, SUFFIXES, Job, MakeMedia, plan_jobs, read_clip
from port_kit.cli.engine_logs import set_engine_logs
from port_kit.cli.make_clips import Console, make_clips, message_of
from port_kit.cli.output import handles_errors
from port_kit.clips import option_types
from port_kit.clips.loras import takes_loras
from port_kit.clips.options import MEDIA_OPTIONS, SEGMENTS
from port_kit.escape import MAX_REASON, escape_control_chars, shortened
from port_kit.parallel.layout import ULYSSES_MODES
from port_kit.port import Port
from port_kit.registry import find_port

PARALLEL_DEGREES = ("tensor_parallel_size", "ulysses_degree", "ring_degree", "cfg_parallel_size")
PARALLEL_OPTIONS = ("ulysses_mode", "use_hsdp", "hsdp_shard_size", "hsdp_replicate_size")
ENGINE_OPTIONS = (
    "dtype",
    "enforce_eager",
    "cache_backend",
    "enable_cpu_offload",
    "enable_layerwise_offload",
    "quantization",
    "diffusion_kv_cache_dtype",
    "vae_use_tiling",
    "vae_fast_path",
)


class _Parser(argparse.ArgumentParser):
    """A parser whose messages, which repeat arguments as they are, are printable and short."""

    def error(self, message: str) -> NoReturn:
        super().error(shortened(escape_control_chars(message), MAX_REASON))


def build_parser(port: Port) -> argparse.ArgumentParser:
    """Return the parser of a port's options; engine options have vLLM-Omni's names."""
    parser = _Parser(prog=f"port-kit generate {port.name}", description=port.title)
    parser.add_argument("--model", required=True, help=f"model directory, made by: port-kit download {port.name}")
    parser.add_argument("-o", "--output", default=None, help=f"default: {port.name}.{SUFFIXES[port.output_type]}")
    parser.add_argument("--contact-sheet", default=None, help="also draw frames and waveform into this PNG")
    parser.add_argument("--prompt", default=None, help=f"default: {port.example_prompt!r}".replace("%", "%%"))
    parser.add_argument("--prompt-file", default=None, help="JSON file that holds the prompt as one string")
    parser.add_argument("--tiny", action="store_true", help=f"settings of the tiny checkpoint: {dict(port.tiny)}")
    parser.add_argument("-v", "--verbose", action="count", default=0, help="show the logs of vLLM-Omni's processes")
    for kind in port.references:
        parser.add_argument(*MEDIA_OPTIONS[kind], dest=kind, nargs="+", default=None, help=f"{kind} files")

    request = parser.add_argument_group("request (defaults are the model's)")
    helps = {
        "seed": f"default: {port.seed}",
        "num_outputs": "default: 1; output i has the seed plus i",
        SEGMENTS: "make a clip of that many parts, each of which continues the one before",
    }
    for name, number in option_types(port).items():
        if name != "prompt":
            request.add_argument(f"--{name.replace('_', '-')}", type=number, default=None, help=helps.get(name))
    if port.output_type == "video":
        request.add_argument("--continue-from", default=None, metavar="CLIP", help="begin with its last frame")

    if takes_loras(port):
        request.add_argument(
            "--lora",
            nargs="+",
            action="extend",
            metavar="PATH",
            help="LoRA: a .safetensors file, or PEFT's folder; several apply together",
        )
        request.add_argument(
            "--lora-scale",
            nargs="+",
            action="extend",
            type=float,
            metavar="X",
            help="strength of each LoRA, in their order; default: 1",
        )

    clips = parser.add_argument_group("clips")
    clips.add_argument("--from-clip", default=None, metavar="CLIP", help="repeat the request that made this file")
    clips.add_argument("--prompts", default=None, metavar="JSONL", help="make a clip of each line, a JSON object")
    clips.add_argument("--output-dir", default=None, metavar="DIR", help="folder for the clips of --prompts")

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
    engine.add_argument("--quantization", default=None, help="fp8: linears in eight bits, quantized while loading")
    engine.add_argument("--diffusion-kv-cache-dtype", default=None, help="fp8: attention in eight bits")
    engine.add_argument("--vae-use-tiling", action="store_true", help="decode tile by tile, in less memory")
    help = "form of the video's decoder on GPUs; channels_last: in float16 (default: lossless)"
    engine.add_argument("--vae-fast-path", default=None, choices=["off", "lossless", "channels_last"], help=help)
    return parser


def engine_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of ``Omni``."""
    given = vars(arguments)
    parallel = {name: given[name] for name in (*PARALLEL_DEGREES, *PARALLEL_OPTIONS) if given[name] is not None}
    options = {name: given[name] for name in ENGINE_OPTIONS if given[name]}
    return {"model": arguments.model, **parallel, **options}


def parse_options(port: Port, options: Sequence[str]) -> argparse.Namespace:
    """Parse the options; those of the engine that change numbers are a clip's, unless they are given."""
    parser = build_parser(port)
    arguments = parser.parse_args(options)
    if (arguments.prompts is None) != (arguments.output_dir is None):
        parser.error("--prompts and --output-dir need each other")
    if arguments.prompts is not None and arguments.output is not None:
        parser.error("--output is for one request; the clips of --prompts are in --output-dir")
    if arguments.from_clip is None:
        return arguments
    engine = read_clip(port, arguments.from_clip).engine
    parser.set_defaults(**{name: engine[name] for name in NUMERIC_OPTIONS if name in engine})
    return parser.parse_args(options)


def run(port: Port, options: Sequence[str], default_media: MakeMedia | None = None) -> int:
    """Make the clips that the options ask for, and print the properties of the files; return the exit code."""
    console = Console()
    try:
        arguments = parse_options(port, options)
        set_engine_logs(arguments.verbose, override=bool(arguments.verbose))
        jobs = plan_jobs(port, arguments, default_media, note=console.note)
        pending = [job for job in jobs if not (job.line and job.is_finished(port))]
        failed = _make(port, arguments, jobs, pending, console)
        _draw(port, arguments, [job for job in jobs if job not in failed], console)
    except Exception as error:
        if (text := message_of(error)) is None:
            raise
        console.note(text)
        return 1
    return 1 if failed else 0


def _make(
    port: Port, arguments: argparse.Namespace, jobs: Sequence[Job], pending: Sequence[Job], console: Console
) -> list[Job]:
    """Make the pending clips; return the jobs that failed, after a summary of a file of prompts."""
    several, failed = arguments.prompts is not None, dict[Job, str]()
    engine = {**engine_options(arguments), "use_tqdm": bool(arguments.verbose)}
    if several:
        console.start(len(jobs), len(jobs) - len(pending))
    try:
        if pending:
            failed = make_clips(port, pending, engine, console)
    finally:
        console.end()
    if several:
        made = len(pending) - len(failed)
        console.note(f"{made} made, {len(jobs) - len(pending)} finished before, {len(failed)} failed")
    for job, message in failed.items():
        console.note(f"{job.name} failed: {message}")
    return list(failed)


def _draw(port: Port, arguments: argparse.Namespace, jobs: Sequence[Job], console: Console) -> None:
    """Draw the contact sheet, which a file of prompts for videos has in any case."""
    from port_kit.reports import draw_contact_sheet, draw_overview

    files = {path: settings.request.get("prompt") or "" for job in jobs for path, settings in job.files(port)}
    if arguments.prompts is None:
        if arguments.contact_sheet:
            sheet = draw_contact_sheet(next(iter(files)), arguments.contact_sheet)
            console.result(f"frames and waveform: {sheet}")
    elif files and (arguments.contact_sheet or port.output_type == "video"):
        sheet = draw_overview(files, arguments.contact_sheet or Path(arguments.output_dir, "contact_sheet.png"))
        console.result(f"frames of all clips: {sheet}")


@click.command(
    "generate",
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
    epilog='Examples:  port-kit generate ovi --model DIR --prompt "rain on a roof" -o rain.mp4  |  '
    "port-kit generate ovi --model DIR --prompts prompts.jsonl --output-dir clips  |  "
    "port-kit generate ovi --model DIR --from-clip rain.mp4 -o again.mp4  |  port-kit generate dreamid_omni --help",
)
@click.argument("port")
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
@handles_errors("generate")
def command(port: str, options: tuple[str, ...]) -> None:
    """Run requests on a port's model directory and write videos as MP4, images, or audio as WAV.

    The files carry their settings: port-kit show FILE prints them, and --from-clip FILE repeats them.

    OPTIONS depend on the port: port-kit generate PORT --help.
    """
    raise SystemExit(run(find_port(port), options))
