"""The clips that one ``port-kit generate`` makes: what each asks for, its file and its settings."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from port_kit.clips import (
    ClipSettings,
    Reference,
    check_first_frame,
    check_loras,
    describe_model,
    lora_reference,
    option_types,
    read_prompts,
    read_settings,
)
from port_kit.clips.loras import LORA, LORA_SCALE
from port_kit.clips.options import CONTINUE_FROM, MEDIA_OPTIONS
from port_kit.errors import InputError
from port_kit.files import read_text
from port_kit.port import HostedPort, Port
from port_kit.runtime.diagnose import installed_versions

#: Suffix of the output, by :attr:`~port_kit.port.Port.output_type`.
SUFFIXES = {"video": "mp4", "image": "png", "audio": "wav"}
#: Options of the engine that change numbers: a repeated clip has them.
NUMERIC_OPTIONS = (
    "dtype",
    "enforce_eager",
    "cache_backend",
    "quantization",
    "diffusion_kv_cache_dtype",
    "vae_use_tiling",
    "vae_fast_path",
)

Media = Mapping[str, Sequence[Any]]
MakeMedia = Mapping[str, Callable[[], Any]]


@dataclass(frozen=True, eq=False)
class Job:
    """One request and its file.

    Attributes:
        path: the file, or the pattern of several.
        settings: of the first output.
        media: references by kind, as the engine takes them.
        continue_from: the clip whose last frame is the first frame.
        loras: paths of the LoRAs.
        line: number in the file of prompts; 0 without one.
    """

    path: Path
    settings: ClipSettings
    media: Media
    continue_from: Path | None = None
    loras: tuple[str, ...] = ()
    line: int = 0

    @property
    def request(self) -> Mapping[str, Any]:
        """Options of the request by name."""
        return self.settings.request

    @property
    def name(self) -> str:
        """Return the name in messages."""
        return f"line {self.line}" if self.line else self.path.name

    def files(self, port: Port) -> Iterator[tuple[Path, ClipSettings]]:
        """Yield the file of each output with its settings.

        An output of a port is repeated by its seed alone; those of a hosted pipeline share one generator.
        """
        count = self.request["num_outputs"]
        for index in range(count):
            path = self.path if count == 1 else self.path.with_stem(f"{self.path.stem}_{index + 1}")
            if isinstance(port, HostedPort):
                yield path, dataclasses.replace(self.settings, output=index)
            else:
                request = {**self.request, "seed": self.request["seed"] + index, "num_outputs": 1}
                yield path, dataclasses.replace(self.settings, request=request)

    def is_finished(self, port: Port) -> bool:
        """Return True if all files are there, with the settings of this request."""
        return all(_has_settings(path, settings) for path, settings in self.files(port))


def _has_settings(path: Path, settings: ClipSettings) -> bool:
    if not path.is_file():
        return False
    try:
        return read_settings(path).makes_same(settings)
    except InputError:  # not a clip of the kit: made again
        return False


def plan_jobs(
    port: Port,
    arguments: argparse.Namespace,
    default_media: MakeMedia | None = None,
    *,
    note: Callable[[str], object] = lambda text: None,
) -> list[Job]:
    """Return the clips to make, checked as far as no engine is needed.

    Args:
        port: the port.
        arguments: of :func:`~port_kit.cli.generate.parse_options`.
        default_media: per kind, a function that makes the media of a request that names none.
        note: receives what a person should know.

    Raises:
        InputError: a name, a file or a combination of options is wrong.
    """
    common = ClipSettings(
        port=port.name,
        model=describe_model(arguments.model),
        request={},
        engine={name: vars(arguments)[name] for name in NUMERIC_OPTIONS if vars(arguments)[name]},
        versions={name: version for name, version in installed_versions().items() if version},
    )
    clip = read_clip(port, arguments.from_clip) if arguments.from_clip else None
    if clip is not None and clip.model.get("content") != common.model.get("content"):
        note(f"note: {arguments.model} has other files than {clip.model.get('name')}, the model directory of the clip")
    request = base_request(port, arguments, clip)
    given = {kind: vars(arguments)[kind] for kind in port.references if vars(arguments)[kind]}
    given |= {CONTINUE_FROM: [arguments.continue_from]} if vars(arguments).get(CONTINUE_FROM) else {}
    given |= {LORA: arguments.lora} if vars(arguments).get(LORA) else {}

    def job(path: Path, request: Mapping[str, Any], given: Media, line: int = 0) -> Job:
        drawn = {kind: make() for kind, make in (default_media or {}).items() if not _is_given(port, kind, given)}
        if clip is not None:
            _compare_references(port, arguments.from_clip, clip, given, drawn, note)
        check_loras(request, given)
        references = {
            kind: tuple(_reference(kind, item) for item in items) for kind, items in {**given, **drawn}.items()
        }
        settings = dataclasses.replace(common, request=request, references=references)
        media = {kind: [_plain(item) for item in items] for kind, items in {**given, **drawn}.items()}
        (source,) = media.pop(CONTINUE_FROM, [None])
        loras = tuple(media.pop(LORA, ()))
        return Job(path, settings, media, None if source is None else Path(source), loras, line)

    if arguments.prompts is None:
        request.setdefault("prompt", port.example_prompt or None)
        check_first_frame(port, request, given)
        return [job(_output(port, arguments.output), request, given)]
    lines = read_prompts(Path(arguments.prompts), port, request, given)
    digits = max(3, len(str(lines[-1].number)))
    folder, suffix = Path(arguments.output_dir), SUFFIXES[port.output_type]
    return [
        job(folder / f"{line.number:0{digits}}.{suffix}", line.request, line.references, line.number) for line in lines
    ]


def read_clip(port: Port, path: str) -> ClipSettings:
    """Return the settings of a clip of a port; raise InputError (``clip_settings``) for one of another port."""
    clip = read_settings(Path(path))
    if clip.port != port.name:
        raise InputError(
            f"{path} was made by {clip.port or 'port-kit run'}; expected the port {port.name}",
            code="clip_settings",
            hint=f"port-kit generate {clip.port} --from-clip {path}"
            if clip.port
            else "port-kit show prints its options",
        )
    return clip


def base_request(port: Port, arguments: argparse.Namespace, clip: ClipSettings | None = None) -> dict[str, Any]:
    """Return the options of a request: those given, over those of the tiny model, over those of a clip."""
    tiny = dict(port.tiny) if arguments.tiny else {}
    tiny |= tiny.pop("extra_args", {})
    given = {name: vars(arguments)[name] for name in option_types(port) if vars(arguments)[name] is not None}
    if vars(arguments).get(LORA_SCALE) is not None:
        given[LORA_SCALE] = arguments.lora_scale
    if arguments.prompt_file:
        given["prompt"] = json.loads(read_text(Path(arguments.prompt_file)))
    defaults = {"seed": port.seed, "num_outputs": 1}
    return {**defaults, **(clip.request if clip else {}), **tiny, **given}


def _reference(kind: str, item: Any) -> Reference:
    return lora_reference(item) if kind == LORA else Reference.of(item)


def _plain(item: Any) -> Any:
    return str(item) if isinstance(item, Path) else item


def _output(port: Port, given: str | None) -> Path:
    """Return the file of one request; refuse the suffix of another modality."""
    suffix = f".{SUFFIXES[port.output_type]}"
    path = Path(given or f"{port.name}{suffix}")
    others = {f".{other}" for kind, other in SUFFIXES.items() if kind != port.output_type}
    if path.suffix != suffix if port.output_type != "image" else path.suffix in others - {".png"}:
        raise InputError(
            f"{path}: the output needs the suffix {suffix}",
            code="media_write",
            hint=f"use {path.with_suffix(suffix)}",
        )
    return path


def _is_given(port: Port, kind: str, given: Media) -> bool:
    """Return True if a request has references of a kind; an image and a clip to continue are both the first frame."""
    first = {"image", CONTINUE_FROM} if port.first_frame else set()
    return kind in given or (kind in first and not first.isdisjoint(given))


def _compare_references(
    port: Port, name: str, clip: ClipSettings, given: Media, drawn: Media, note: Callable[[str], object]
) -> None:
    """Require the references that a clip was made from; note those with another content."""
    for kind, references in clip.references.items():
        named = [reference.name for reference in references if reference.name]
        if not _is_given(port, kind, given) and (named or kind not in drawn):
            option = MEDIA_OPTIONS[kind][0] if kind in MEDIA_OPTIONS else f"--{kind.replace('_', '-')}"
            raise InputError(
                f"{name} was made with {kind} {', '.join(named) or 'that a script drew'}, which is not in the file",
                code="input_missing",
                hint=f"add {option} {' '.join(named) or 'FILE'}",
            )
        for item, reference in zip(given.get(kind, ()), references, strict=False):
            if _reference(kind, item).sha256 != reference.sha256:
                note(f"note: {item} differs from {reference.name or 'what a script drew'}, the {kind} of {name}")
