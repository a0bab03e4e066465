"""``port-kit run``: a pipeline of diffusers through vLLM-Omni, without a port."""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
import sys
from pathlib import Path
from typing import Any

import click

from port_kit.cli.engine_logs import set_engine_logs
from port_kit.cli.output import handles_errors
from port_kit.clips import ClipSettings, Reference, attach_settings, describe_model
from port_kit.errors import InputError
from port_kit.parallel.layout import CONFIG_NAMES, ULYSSES_MODES, Layout
from port_kit.runtime.diagnose import installed_versions
from port_kit.serving import GATEWAY, SERVER

#: Request options, by their type; None keeps the pipeline's default.
_REQUEST = {
    "height": (int, "Pixels."),
    "width": (int, "Pixels."),
    "num_frames": (int, "Frames of a video."),
    "num_inference_steps": (int, "Denoising steps."),
    "guidance_scale": (float, "Scale of guidance."),
    "true_cfg_scale": (float, "Scale of guidance of pipelines whose guidance_scale is an input of the model."),
    "fps": (float, "Frames per second of the file."),
    "seed": (int, "Default: drawn at random, and printed."),
    "num_outputs": (int, "Outputs of the request."),
}
#: Descriptions of the degrees of parallelism.
_DEGREES = {
    "tp": "Ranks that split each matrix.",
    "ulysses": "Ranks that split a sequence and exchange heads.",
    "ring": "Ranks that split a sequence and circulate keys and values.",
    "cfg": "Ranks that share the branches of guidance.",
}


def _request_options(function: Any) -> Any:
    for name, (kind, text) in reversed(_REQUEST.items()):
        function = click.option(f"--{name.replace('_', '-')}", type=kind, help=text)(function)
    return function


def _layout_options(function: Any) -> Any:
    for kind, text in reversed(_DEGREES.items()):
        option = f"--{CONFIG_NAMES[kind].replace('_', '-')}"
        function = click.option(option, type=int, default=1, show_default=True, help=text)(function)
    return function


@click.command(
    "run",
    context_settings={"ignore_unknown_options": True},
    epilog='Examples:  port-kit run black-forest-labs/FLUX.1-dev --tensor-parallel-size 2 --prompt "a red cat"  |  '
    "port-kit run DIR --cfg-parallel-size 2 --num-frames 81 -o cat.mp4  |  port-kit run DIR --serve --port 8000",
)
@click.argument("model")
@click.argument("serve_options", nargs=-1, type=click.UNPROCESSED)
@click.option("--prompt", default="", help="Text of the request.")
@click.option("--negative-prompt", help="Text of the branch that guidance leads away from.")
@click.option("--image", type=click.Path(path_type=Path, exists=True), help="Reference image.")
@_request_options
@click.option("--argument", "arguments", multiple=True, metavar="NAME=JSON", help="Further argument of the pipeline.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Default: output.png, .mp4 or .wav.")
@_layout_options
@click.option("--ulysses-mode", type=click.Choice(ULYSSES_MODES), help="advanced_uaa: pad uneven heads.  [strict]")
@click.option("--hsdp-shard-size", type=int, default=1, show_default=True, help="Shard blocks over these ranks (HSDP).")
@click.option("--cache-backend", type=click.Choice(["cache_dit"]), help="Reuse results of blocks from step to step.")
@click.option("--cache-config", metavar="JSON", help="vLLM-Omni's settings of the cache, as in vllm serve.")
@click.option("--plan", type=click.Path(path_type=Path), help="Plan file. Default: the shipped one, or infer one.")
@click.option("--dtype", default="bfloat16", show_default=True, help="Dtype of all components.")
@click.option("--enforce-eager", is_flag=True, help="Do not compile.")
@click.option("-v", "--verbose", count=True, help="Show the logs of vLLM-Omni's processes.")
@click.option("--serve", is_flag=True, help="Start vLLM-Omni's server; further options are passed to vllm serve.")
@handles_errors("run")
def command(model: str, serve_options: tuple[str, ...], serve: bool, verbose: int, **given: Any) -> None:
    """Generate with MODEL, a pipeline of diffusers: a directory, or a repository on the Hub.

    The transformer is adapted by a parallel plan. Options of the engine have vLLM-Omni's names.
    """
    if serve_options and not serve:
        raise click.UsageError(f"no such option or argument: {serve_options[0]}")
    if verbose or serve:
        set_engine_logs(verbose or 1, override=True)
    cache_options(given)
    degrees = {kind: given[name] for kind, name in CONFIG_NAMES.items() if name in given}
    layout = Layout(**degrees, uaa=given["ulysses_mode"] == ULYSSES_MODES[1])
    folder, class_name, modality, additional = _prepare(model, layout, given)
    if serve:
        arguments = serve_command(folder, class_name, additional, layout, given)
        os.execv(sys.executable, [*arguments, *serve_options])
    else:
        _generate(model, folder, class_name, modality, additional, layout, given)


def _prepare(model: str, layout: Layout, given: dict[str, Any]) -> tuple[str, str, str, dict[str, str]]:
    """Return the directory, the class that hosts it, its modality, and ``additional_config``."""
    from port_kit.autoparallel.host.index import PipelineIndex
    from port_kit.runtime.hosts import host_of

    folder = model if Path(model).is_dir() else _download(model)
    index = PipelineIndex.read(folder)
    cached = given["cache_backend"] is not None
    additional = {}
    if set(layout.degrees) - {"cfg"} or cached:
        # imports vLLM, which a server does again in its own process
        from port_kit.autoparallel.host.plans import PLAN_KEY, find_plan

        plan = find_plan(index, layout, given["plan"], report=_report, cached=cached)
        additional[PLAN_KEY] = str(plan.resolve())
    return folder, host_of(index.output_type), index.output_type, additional


def _download(repository: str) -> str:
    """Download the files of a pipeline that diffusers needs, and return their directory."""
    from diffusers import DiffusionPipeline

    _report(f"downloading {repository}")
    folder: str = DiffusionPipeline.download(repository)
    return folder


def _report(line: str) -> None:
    click.echo(line, err=True)


def _generate(
    model: str,
    folder: str,
    class_name: str,
    modality: str,
    additional: dict[str, str],
    layout: Layout,
    given: dict[str, Any],
) -> None:
    from port_kit.autoparallel.host.checks import check_ran
    from port_kit.autoparallel.host.files import SUFFIXES, write_files
    from port_kit.runtime.refusals import hide_tracebacks_of_refusals, refusal_of

    # an engine in this process prefixes every line on stdout with its name: duplicate the descriptor before
    stdout = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    from vllm_omni import Omni

    output = given["output"] or Path("output").with_suffix(SUFFIXES[modality])
    prompt, sampling = _request(given)
    hide_tracebacks_of_refusals()
    _report(f"seed {sampling.seed}" + (" (drawn at random)" if given["seed"] is None else ""))
    omni = Omni(
        model=folder,
        model_class_name=class_name,
        dtype=given["dtype"],
        additional_config=additional,
        enforce_eager=given["enforce_eager"],
        **layout.parallel_config,
        **cache_options(given),
    )
    try:
        (result,) = omni.generate(prompt, sampling, use_tqdm=False)
        check_ran(result, layout)
        settings = _settings(model, sampling, given)
        for index, path in enumerate(write_files(output, result, modality)):
            attach_settings(path, dataclasses.replace(settings, output=index))
            print(path, file=stdout, flush=True)
    except ValueError as error:
        if refusal_of(error) is not None:
            raise
        print(error, file=sys.stderr)
        raise SystemExit(1) from error
    finally:
        omni.close()


def _request(given: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    from vllm_omni.inputs.data import OmniDiffusionSamplingParams

    prompt: dict[str, Any] = {"prompt": given["prompt"]}
    if given["negative_prompt"] is not None:
        prompt["negative_prompt"] = given["negative_prompt"]
    if given["image"] is not None:
        from PIL import Image

        prompt["multi_modal_data"] = {"image": Image.open(given["image"]).convert("RGB")}
    sampling = {"seed": secrets.randbelow(1 << 31)}
    sampling |= {name: given[name] for name in _REQUEST if given[name] is not None}
    outputs = sampling.pop("num_outputs", 1)
    extra = dict(map(_argument, given["arguments"]))
    return prompt, OmniDiffusionSamplingParams(num_outputs_per_prompt=outputs, extra_args=extra, **sampling)


def _settings(model: str, sampling: Any, given: dict[str, Any]) -> ClipSettings:
    """Return the settings that the files carry."""
    names = ("prompt", "negative_prompt", *_REQUEST)
    request = {name: given[name] for name in names if given[name] is not None}
    request |= {**sampling.extra_args, "seed": sampling.seed}
    return ClipSettings(
        port="",
        model=describe_model(model),
        request=request,
        references={"image": (Reference.of(given["image"]),)} if given["image"] else {},
        engine={name: given[name] for name in ("dtype", "enforce_eager", "cache_backend") if given[name]},
        versions={name: version for name, version in installed_versions().items() if version},
    )


def cache_options(given: dict[str, Any]) -> dict[str, Any]:
    """Return the engine's options of the cache.

    Raises:
        InputError: ``input_value``; the settings are not a JSON object, or are given without a cache.
    """
    backend, text = given["cache_backend"], given["cache_config"]
    if backend is None and text is None:
        return {}
    try:
        settings = json.loads(text or "{}")
    except json.JSONDecodeError:
        settings = None
    if backend is None or not isinstance(settings, dict):
        raise InputError(
            f"--cache-config {text}: expected a JSON object, and --cache-backend",
            code="input_value",
            hint="--cache-backend cache_dit --cache-config '{\"residual_diff_threshold\": 0.12}'",
        )
    return {"cache_backend": backend, "cache_config": settings}


def _argument(text: str) -> tuple[str, Any]:
    name, found, value = text.partition("=")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError as error:
        raise InputError(
            f"--argument {text}: {'no JSON after =' if found else 'no ='}",
            code="input_value",
            hint="write NAME=JSON, such as --argument max_sequence_length=128",
        ) from error


def serve_command(
    folder: str, class_name: str, additional: dict[str, str], layout: Layout, given: dict[str, Any]
) -> list[str]:
    """Return the command of vLLM-Omni's server, without further options of the user."""
    command = [sys.executable, "-m", SERVER, "serve", folder, "--omni"]
    command += ["--model-class-name", class_name, "--dtype", given["dtype"]]
    command += ["--middleware", GATEWAY]
    for name, value in layout.parallel_config.items():
        command += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    for name, value in cache_options(given).items():
        command += [f"--{name.replace('_', '-')}", value if isinstance(value, str) else json.dumps(value)]
    if additional:
        command += ["--additional-config", json.dumps(additional)]
    return [*command, "--enforce-eager"] if given["enforce_eager"] else command
