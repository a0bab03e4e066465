"""Reader of model cards: license and origin from the metadata, git and Hub repositories from the text."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from port_kit.inspect.report import ModelCard

_METADATA = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)^---[ \t]*$", re.DOTALL | re.MULTILINE)
_GIT = re.compile(r"(?:https?://)?(?:www\.)?(github\.com|gitlab\.com|bitbucket\.org)/([\w.-]+)/([\w.-]+)", re.ASCII)
_HUB = re.compile(r"(?:huggingface\.co|hf\.co)/([\w.-]+)/([\w.-]+)", re.ASCII)
_CLI = re.compile(r"\b(?:hf|huggingface-cli) download ([\w.-]+)/([\w.-]+)", re.ASCII)
#: First path components of Hub URLs that are not organizations.
_PLACES = {"api", "blog", "collections", "datasets", "docs", "join", "models", "organizations", "papers", "spaces"}
#: First path components of GitHub URLs that are not owners.
_NOT_OWNERS = {"features", "orgs", "sponsors", "user-attachments"}


def read_model_card(text: str) -> ModelCard:
    """Read a card; metadata that is no YAML is a ``problem``, as the Hub itself shows such cards without it."""
    found = _METADATA.search(text)
    metadata, problem = _parse(found[1]) if found else ({}, "")
    licence, name = _word(metadata.get("license")), _word(metadata.get("license_name"))
    return ModelCard(
        licence=name if name and licence in ("", "other") else licence,
        licence_link=_word(metadata.get("license_link")),
        base_models=tuple(_words(metadata.get("base_model"))),
        task=_word(metadata.get("pipeline_tag")),
        code=tuple(dict.fromkeys(_git_repositories(text))),
        repositories=tuple(dict.fromkeys(_hub_repositories(text))),
        asks_terms=any(str(key).startswith("extra_gated_") for key in metadata),
        problem=problem,
    )


def _parse(block: str) -> tuple[Mapping[str, Any], str]:
    import yaml

    try:
        metadata = yaml.safe_load(block)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a date that cannot be; brackets without end
        return {}, f"its metadata is no YAML: {str(error).splitlines()[0]}"
    if metadata is None or isinstance(metadata, dict):
        return metadata or {}, ""
    return {}, f"its metadata is a {type(metadata).__name__}, not an object"


def _word(value: object) -> str:
    return ", ".join(_words(value))


def _words(value: object) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [str(item) for item in values if isinstance(item, (str, int, float)) and str(item)]


def _git_repositories(text: str) -> Iterator[str]:
    for host, owner, name in _GIT.findall(text):
        if owner not in _NOT_OWNERS:
            yield f"https://{host}/{owner}/{_trimmed(name)}"


def _hub_repositories(text: str) -> Iterator[str]:
    for owner, name in _HUB.findall(text) + _CLI.findall(text):
        if owner not in _PLACES:
            yield f"{owner}/{_trimmed(name)}"


def _trimmed(name: str) -> str:
    """Return a name without a trailing period and the suffix ``.git``."""
    return name.rstrip(".").removesuffix(".git")
