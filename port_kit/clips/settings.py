"""The settings of a clip in its file: the comment of an MP4, a WAV or a PNG holds them as JSON.

They have no paths, tokens or variables of the environment: of a model directory and of a reference, only the name and
the content's hash.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from port_kit.download.lock import read_lock
from port_kit.errors import InputError, OptionalDependencyError
from port_kit.escape import quoted, reason_of
from port_kit.files import digests_of

SCHEMA = "port-kit-clip/1"
#: The field of a file, which MP4, WAV and PNG have, and which other programs show.
FIELD = "comment"
#: Suffixes of files that carry settings.
CARRIERS = (".mp4", ".wav", ".png")


@dataclass(frozen=True)
class Reference:
    """A reference of a request; its content is not in the clip.

    Attributes:
        name: of the file, without its folder; empty if a script drew the reference.
        sha256: of the file's content; empty if a script drew it.
    """

    name: str = ""
    sha256: str = ""

    @classmethod
    def of(cls, source: object) -> Reference:
        """Return the reference of a path; anything else was drawn by a script."""
        if not isinstance(source, str | Path):
            return cls()
        path = Path(source)
        if not path.is_file():
            raise InputError(f"the reference {path} does not exist", code="source_missing", hint="correct its path")
        return cls(path.name, digests_of(path, git=False)["sha256"])


@dataclass(frozen=True)
class ClipSettings:
    """All that repeats a clip, beside its references.

    Attributes:
        port: name of the port; empty for a pipeline of diffusers without one.
        model: ``name`` of the model directory, and ``content``, a hash over its files, if it has a ``port.lock``.
        request: options of the request by name; defaults of the model are not in it, the seed always is.
        references: the references by kind.
        engine: options of the engine that change numbers.
        versions: versions of the installed packages.
        output: index among the outputs that share one generator.
    """

    port: str
    model: Mapping[str, str]
    request: Mapping[str, Any]
    references: Mapping[str, tuple[Reference, ...]] = field(default_factory=dict)
    engine: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    output: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return the plain form."""
        plain: dict[str, Any] = json.loads(json.dumps({"schema": SCHEMA, **dataclasses.asdict(self)}))
        return plain

    @classmethod
    def from_json(cls, data: Any) -> ClipSettings:
        """Build settings from their plain form; raise ValueError, KeyError or TypeError for any other."""
        fields = dict(data)
        if (schema := fields.pop("schema")) != SCHEMA:
            raise ValueError(f"schema {quoted(schema)}; expected {SCHEMA}")
        mappings = ("model", "request", "references", "engine", "versions")
        if not all(isinstance(fields[name], dict) for name in mappings) or not isinstance(fields["port"], str):
            raise ValueError("a field is not as it was written")
        kinds = {kind: tuple(Reference(**item) for item in items) for kind, items in fields["references"].items()}
        return cls(**{**fields, "references": kinds})

    def makes_same(self, other: ClipSettings) -> bool:
        """Return True if all but the versions is equal."""
        own, others = self.to_json(), other.to_json()
        return {**own, "versions": {}} == {**others, "versions": {}}


def describe_model(directory: Path | str) -> dict[str, str]:
    """Return the name of a model directory, and the hash over its files if it has a ``port.lock``.

    No weight is read: the lock has the hashes of all files.
    """
    path = Path(directory)
    lock = read_lock(path) if path.is_dir() else None
    name = {"name": path.resolve().name if path.is_dir() else path.name}
    if lock is None:
        return name
    content = json.dumps(sorted(lock.contents()))
    return {**name, "content": hashlib.sha256(content.encode()).hexdigest()}


def attach_settings(path: Path, settings: ClipSettings) -> None:
    """Put settings into a file of :data:`CARRIERS`, which is replaced; other files stay as they are.

    Streams are copied, not encoded again.

    Raises:
        InputError: ``media_write``; the file cannot be read.
    """
    text = json.dumps(settings.to_json())
    if path.suffix == ".png":
        from PIL import Image
        from PIL.PngImagePlugin import PngInfo

        info = PngInfo()
        info.add_text(FIELD, text)
        with Image.open(path) as image:
            image.load()
            image.save(path, pnginfo=info)
    elif path.suffix in CARRIERS:
        temporary = path.with_stem(f"{path.stem}~")
        with opened(path) as source, opened(temporary, "w") as target:
            target.metadata[FIELD] = text
            streams = {stream.index: target.add_stream_from_template(stream) for stream in source.streams}
            for packet in source.demux():
                if packet.dts is not None:  # the last packet of a stream is empty
                    packet.stream = streams[packet.stream.index]
                    target.mux(packet)
        temporary.replace(path)


def read_settings(path: Path) -> ClipSettings:
    """Return the settings in a file.

    Raises:
        InputError: ``source_missing``, ``media_write``, or ``clip_settings`` if it has none that can be read.
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist", code="source_missing", hint="correct the path")
    text = _comment(path)
    try:
        return ClipSettings.from_json(json.loads(text or ""))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        found = (
            f"settings that cannot be read ({reason_of(error)})" if SCHEMA.partition("/")[0] in text else "no settings"
        )
        raise InputError(
            f"{path} has {found}; expected the settings that port-kit generate writes",
            code="clip_settings",
            hint="take the file as it was written: programs that convert or upload clips remove them",
        ) from error


def _comment(path: Path) -> str:
    if path.suffix == ".png":
        from PIL import Image

        try:
            with Image.open(path, formats=["PNG"]) as image:
                return str(image.info.get(FIELD, ""))
        except OSError as error:
            raise InputError(f"{path} cannot be read: {reason_of(error)}", code="media_write") from error
    with opened(path) as container:
        return str(container.metadata.get(FIELD, ""))


@contextmanager
def opened(path: Path, mode: str = "r") -> Iterator[Any]:
    """Open a media file with PyAV.

    Raises:
        InputError: ``media_write``; FFmpeg cannot read or write it.
        OptionalDependencyError: PyAV is not installed.
    """
    try:
        import av
    except ModuleNotFoundError as error:
        raise OptionalDependencyError(
            f"clips need the package {quoted(error.name)}, which is not installed",
            hint="install the runtime: pip install 'port-kit[omni]'",
        ) from error
    try:
        with av.open(str(path), mode) as container:
            yield container
    except (av.FFmpegError, OSError) as error:
        verb = "read" if mode == "r" else "written"
        raise InputError(f"{path} cannot be {verb}: {reason_of(error)}", code="media_write") from error
