"""Source given by ``--from``: facts of a repository or folder, as a port's files need them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, cast

from port_kit.errors import ScaffoldError
from port_kit.inspect import Inspection, inspect
from port_kit.scaffold.request import PortPath

#: What a diffusers pipeline's components are called, and which of their files a model directory needs.
FOLDERS: Mapping[str, tuple[str, ...]] = {
    "transformer": ("transformer/config.json", "transformer/*.safetensors*"),
    "vae": ("vae/config.json", "vae/*.safetensors*"),
    "text_encoder": ("text_encoder/config.json", "text_encoder/*.safetensors*"),
    "tokenizer": ("tokenizer/*",),
    "scheduler": ("scheduler/*",),
}
#: What diffusers and transformers call a component's weights in one file.
_USUAL = ("diffusion_pytorch_model.safetensors", "model.safetensors")


@dataclass(frozen=True)
class Source:
    """Location of a model's weights.

    Attributes:
        inspection: everything that was found; None where nothing was inspected.
        repository: ``organisation/name``; a stand-in where it is not known.
        revision: 40 hex digits, or None.
        licence: one line, or empty.
        transformer: content of ``transformer/config.json``, or empty.
        listed: the repository's files; empty where it was not listed.
    """

    repository: str
    inspection: Inspection | None = None
    revision: str | None = None
    licence: str = ""
    transformer: Mapping[str, Any] = field(default_factory=dict)
    listed: tuple[str, ...] = ()

    def patterns(self, folder: str) -> tuple[str, ...]:
        """Return the patterns of a component's files; of a listed repository only those that match something.

        Where one file of the usual name has all the weights it is named itself: other variants may lie beside it.
        """
        patterns = FOLDERS[folder]
        if not self.listed:
            return patterns
        part = self.inspection.component(folder) if self.inspection else None
        names = [file.path for file in part.weights] if part else []
        if len(names) == 1 and names[0].rpartition("/")[2] in _USUAL:
            patterns = (patterns[0], names[0])
        return tuple(p for p in patterns if any(fnmatchcase(path, p) for path in self.listed))


def read_source(target: str, default: str, *, endpoint: str | None = None) -> Source:
    """Inspect a repository or folder; without one, only the default repository's name is known.

    Args:
        target: ``organisation/name``, a folder, or empty.
        default: the repository where ``target`` is empty, or is a folder.
        endpoint: of the Hub; default ``HF_ENDPOINT``.

    Raises:
        InspectError: it is neither, or holds no model.
        DownloadError: the repository does not exist, may not be seen, or cannot be reached.
        ScaffoldError: the files that tell are behind a gate.
    """
    if not target:
        return Source(default)
    found = inspect(target, endpoint=endpoint)
    if found.path == "unknown":
        raise ScaffoldError(f"{target} cannot be read: {found.gate}", code="scaffold_unsupported", hint=found.next)
    documents = _documents(target, found.commit, endpoint)
    return Source(
        repository=target if found.commit else default,
        inspection=found,
        revision=found.commit,
        licence=found.card.licence,
        transformer=documents[0],
        listed=documents[1],
    )


def _documents(target: str, commit: str | None, endpoint: str | None) -> tuple[Mapping[str, Any], tuple[str, ...]]:
    from port_kit.inspect.documents import Documents
    from port_kit.inspect.file_listing import open_listing

    with open_listing(target, commit, endpoint, None) as listing:
        return Documents(listing).object("transformer/config.json"), tuple(listing.files)


def choose_path(given: str | None, source: str, transformer: str, endpoint: str | None) -> PortPath:
    """Return the path that was asked for; without one, that of the named class or of the source.

    Raises:
        ScaffoldError: the source is served already.
    """
    if given:
        return cast(PortPath, given)
    if transformer:
        return "diffusers"
    found = inspect(source, endpoint=endpoint)
    if found.path == "supported":
        raise ScaffoldError(
            f"{source} needs no port: {found.evidence[-1].fact}", code="scaffold_unsupported", hint=found.next
        )
    return found.path if found.path in ("diffusers", "hybrid") else "custom"
