"""Source given by ``--from``: facts of a repository or folder, as a port's files need them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from port_kit.checkpoint.configuration import CONFIG_NAME
from port_kit.errors import ScaffoldError
from port_kit.inspect import Inspection, inspect
from port_kit.inspect.documents import Documents
from port_kit.inspect.file_listing import open_listing
from port_kit.scaffold.request import PortPath


@dataclass(frozen=True)
class Source:
    """Location of a model's weights.

    Attributes:
        repository: ``organisation/name``; a stand-in where it is not known.
        inspection: everything that was found; None where nothing was inspected.
        revision: 40 hex digits, or None.
        licence: one line, or empty.
        index: content of ``model_index.json``, or empty.
        configs: contents of the files called ``config.json`` by their paths.
        listed: the repository's files; empty where it was not listed.
    """

    repository: str
    inspection: Inspection | None = None
    revision: str | None = None
    licence: str = ""
    index: Mapping[str, Any] = field(default_factory=dict)
    configs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    listed: tuple[str, ...] = ()


def read_source(target: str, default: str, *, endpoint: str | None = None, wrapper: str = "") -> Source:
    """Inspect a repository or folder; without one, only the default repository's name is known.

    Args:
        target: ``organisation/name``, a folder, or empty.
        default: the repository where ``target`` is empty, or is a folder.
        endpoint: of the Hub; default ``HF_ENDPOINT``.
        wrapper: see :func:`port_kit.inspect.inspect`.

    Raises:
        InspectError: it is neither, or holds no model.
        DownloadError: the repository does not exist, may not be seen, or cannot be reached.
        ScaffoldError: the files that tell are behind a gate.
    """
    if not target:
        return Source(default)
    found = inspect(target, endpoint=endpoint, wrapper=wrapper)
    if found.path == "unknown":
        raise ScaffoldError(f"{target} cannot be read: {found.gate}", code="scaffold_unsupported", hint=found.next)
    index, configs, listed = _documents(target, found.commit, endpoint)
    return Source(
        repository=target if found.commit else default,
        inspection=found,
        revision=found.commit,
        licence=found.card.licence,
        index=index,
        configs=configs,
        listed=listed,
    )


def _documents(
    target: str, commit: str | None, endpoint: str | None
) -> tuple[Mapping[str, Any], Mapping[str, Mapping[str, Any]], tuple[str, ...]]:
    with open_listing(target, commit, endpoint, None) as listing:
        documents = Documents(listing)
        index = documents.object("model_index.json")
        configs = {path: documents.object(path) for path in listing.files if path.rpartition("/")[2] == CONFIG_NAME}
        return index, configs, tuple(listing.files)


def choose_path(given: str | None, source: str, code: str, endpoint: str | None) -> PortPath:
    """Return the path that was asked for; without one, that of git code or of the source.

    Raises:
        ScaffoldError: the source is served already.
    """
    if given:
        return cast(PortPath, given)
    if code:
        return "external"
    found = inspect(source, endpoint=endpoint)
    if found.path == "supported":
        facts = [finding.fact for finding in found.evidence]
        served = next((fact for fact in facts if found.class_name and found.class_name in fact), facts[-1])
        raise ScaffoldError(f"{source} needs no port: {served}", code="scaffold_unsupported", hint=found.next)
    return found.path if found.path in ("diffusers", "hybrid") else "custom"
