"""Clips through vLLM-Omni's offline engine: requests, segments, files with their settings."""

from __future__ import annotations

import dataclasses
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from port_kit.cli.clip_jobs import Job
from port_kit.cli.output import error_text
from port_kit.clips import attach_settings, join_results, last_frame
from port_kit.clips.loras import LORA_SCALE
from port_kit.clips.options import SEGMENTS
from port_kit.escape import escape_control_chars, reason_of
from port_kit.files import os_errors_as
from port_kit.port import HostedPort, Port
from port_kit.runtime.lora_sets import write_set
from port_kit.runtime.refusals import refusal_of

#: Options of a request that have a place of their own, not in the sampling parameters or in ``extra_args``.
_ELSEWHERE = ("prompt", "negative_prompt", "num_outputs", SEGMENTS, LORA_SCALE)

Generate = Callable[[dict[str, Any], Any], Any]


def build_request(
    port: Port, request: Mapping[str, Any], media: Mapping[str, Sequence[Any]], loras: Sequence[str] = ()
) -> tuple[dict[str, Any], Any]:
    """Return the prompt and ``OmniDiffusionSamplingParams``; options that are not given keep the model's defaults.

    Args:
        port: the port.
        request: options by name.
        media: references by kind.
        loras: paths of LoRAs, whose scales are in the request.
    """
    from vllm_omni.inputs.data import OmniDiffusionSamplingParams

    fields = {field.name for field in dataclasses.fields(OmniDiffusionSamplingParams)} - set(port.request_options)
    options = {name: value for name, value in request.items() if name not in _ELSEWHERE}
    sampling = {name: value for name, value in options.items() if name in fields}
    if "guidance_scale" in sampling:
        sampling["guidance_scale_provided"] = True
    extra = {name: value for name, value in options.items() if name not in fields}
    prompt: dict[str, Any] = {"prompt": request.get("prompt")}
    if "negative_prompt" in request:
        prompt["negative_prompt"] = request["negative_prompt"]
    if media:
        prompt["multi_modal_data"] = dict(media)
    if loras:
        sampling |= _lora_fields(loras, request.get(LORA_SCALE) or [1.0] * len(loras))
    return prompt, OmniDiffusionSamplingParams(
        extra_args=extra, num_outputs_per_prompt=request["num_outputs"], **sampling
    )


def _lora_fields(paths: Sequence[str], scales: Sequence[float]) -> dict[str, Any]:
    """Return the sampling parameters of LoRAs; several are a set, which stands for one."""
    from vllm.lora.request import LoRARequest

    name = " + ".join(Path(path).stem for path in paths)
    if len(paths) == 1:
        path, scale = Path(paths[0]).expanduser().absolute(), scales[0]
    else:
        path, scale = write_set(list(zip(paths, scales, strict=True))), 1.0
    # the number is replaced by one of the content when the request arrives
    return {"lora_request": LoRARequest(name, 1, str(path)), "lora_scale": scale}


def generate_clip(port: Port, job: Job, generate: Generate) -> Any:
    """Return the result of a job: of one request, or of its segments, joined; segment i has the seed plus i.

    Raises:
        InputError: ``media_write``, ``input_size``; the clip to continue has no frames, or the segments do not fit.
    """
    from PIL import Image

    request, media = dict(job.request), dict(job.media)
    if job.continue_from:
        frame = last_frame(job.continue_from)
        media["image"] = [frame]
        request = {"height": frame.height, "width": frame.width, **request}
    results: list[Any] = []
    for index in range(request.get(SEGMENTS, 1)):
        if results:
            frame = Image.fromarray(results[-1].images[0][-1])
            media["image"] = [frame]
            request |= {"height": frame.height, "width": frame.width}
        part = {**request, "seed": request["seed"] + index}
        results.append(generate(*build_request(port, part, media, job.loras)))
    return join_results(results)


class Console:
    """The standard streams of a command; an engine in the process prefixes what others write with its name."""

    def __init__(self) -> None:
        self._stdout, self._stderr = (os.fdopen(os.dup(stream.fileno()), "w") for stream in (sys.stdout, sys.stderr))
        self._bar = tqdm(disable=True)

    def start(self, total: int, done: int) -> None:
        """Show a bar of clips, on a terminal."""
        shown = self._stderr.isatty()
        self._bar = tqdm(total=total, initial=done, unit="clip", file=self._stderr, disable=not shown)

    def advance(self) -> None:
        """Count a clip."""
        self._bar.update()

    def end(self) -> None:
        """Remove the bar."""
        self._bar.close()

    def result(self, text: str) -> None:
        """Print a line on stdout."""
        self._print(text, self._stdout)

    def note(self, text: str) -> None:
        """Print a line on stderr."""
        self._print(text, self._stderr)

    def _print(self, text: str, stream: TextIO) -> None:
        self._bar.clear()
        print(escape_control_chars(text, keep="\n\t"), file=stream, flush=True)
        self._bar.refresh()


def make_clips(port: Port, jobs: Sequence[Job], engine: Mapping[str, Any], console: Console) -> dict[Job, str]:
    """Make clips with one engine, and print the properties of their files.

    Args:
        port: the port.
        jobs: one or several.
        engine: arguments of ``Omni``, and ``use_tqdm``.
        console: receives lines and progress.

    Returns:
        The messages of the jobs of a file of prompts that failed. The error of any other job is raised.

    Raises:
        PortKitError: ``model_incomplete``; the model directory has no index.
    """
    from port_kit.pipeline.model_index import ModelIndex

    failed: dict[Job, str] = {}
    ModelIndex.read(engine["model"]).text("_class_name")
    console.note("starting the engine")
    began = time.perf_counter()
    with _started(engine) as generate:
        start = time.perf_counter() - began
        for job in jobs:
            began = time.perf_counter()
            try:
                result = generate_clip(port, job, generate)
                seconds = time.perf_counter() - began
                for facts in write_clip(port, job, result):
                    console.result(f"{facts}, engine started in {start:.1f} s, generated in {seconds:.1f} s")
            except Exception as error:
                if not job.line:
                    raise
                text = message_of(error)
                console.note(f"{job.name}: {text or traceback.format_exc()}")
                failed[job] = text or f"{type(error).__name__}: {reason_of(error)}"
            console.advance()
    return failed


@contextmanager
def _started(engine: Mapping[str, Any]) -> Iterator[Generate]:
    """Start an engine and yield the function that runs one request."""
    from vllm_omni import Omni

    from port_kit.runtime.refusals import hide_tracebacks_of_refusals

    options = dict(engine)
    use_tqdm = options.pop("use_tqdm")
    hide_tracebacks_of_refusals()
    omni = Omni(**options)

    def generate(prompt: dict[str, Any], sampling: Any) -> Any:
        # A generator raises the error of a refused request without closing the engine.
        (result,) = omni.generate(prompt, sampling, py_generator=True, use_tqdm=use_tqdm)
        return result

    try:
        yield generate
    finally:
        omni.close()


def write_clip(port: Port, job: Job, result: Any) -> list[str]:
    """Write the outputs of a job with their settings; each file is complete or absent. Return a line about each."""
    from port_kit.pipeline.media import describe_file

    lines = []
    with os_errors_as(job.path, hint="choose another output"):
        job.path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{job.path.name}.", dir=job.path.parent) as folder:
            written = _write(port, Path(folder, job.path.name), result)
            for temporary, (path, settings) in zip(written, job.files(port), strict=True):
                attach_settings(temporary, settings)
                facts = describe_file(temporary.replace(path))
                lines.append(f"{facts}, seed {settings.request['seed']}")
    return lines


def _write(port: Port, path: Path, result: Any) -> list[Path]:
    """Write the outputs of a result; a hosted pipeline may return several channels of audio."""
    if isinstance(port, HostedPort):
        from port_kit.autoparallel.host.files import write_files

        return write_files(path, result, port.output_type)
    from port_kit.pipeline.media import write_result

    return write_result(path, result)


def message_of(error: Exception) -> str | None:
    """Return the text of an error of the kit or of a request; None for other errors, whose tracebacks are shown."""
    refusal = refusal_of(error)
    if refusal is not None:
        return error_text(refusal)
    return reason_of(error) if isinstance(error, ValueError) else None
