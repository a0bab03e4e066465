"""Inspection of a model: listing, headers, card, classification, missing files, memory, next step."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from port_kit.errors import InspectError
from port_kit.inspect.classify import Classification, classify
from port_kit.inspect.components import CONFIGS, INDEXES, denoises, find_components, is_denoiser
from port_kit.inspect.documents import Documents
from port_kit.inspect.file_listing import FileListing, open_listing
from port_kit.inspect.missing_files import find_missing_files
from port_kit.inspect.model_card import read_model_card
from port_kit.inspect.pitfalls import find_pitfalls
from port_kit.inspect.port_name import next_command
from port_kit.inspect.report import Component, Inspection, Memory, WeightFile
from port_kit.inspect.weights import is_weights, read_weights

_T = TypeVar("_T")
_CONNECTIONS = 8
_RANKS = (1, 2, 4, 8)


def inspect(
    target: str,
    *,
    revision: str | None = None,
    endpoint: str | None = None,
    token: str | bool | None = None,
    wrapper: str = "",
) -> Inspection:
    """Classify a repository or folder for vLLM-Omni by its listing, small text files and headers.

    No file of weights is downloaded, no code is executed, and neither torch nor vLLM-Omni is imported.

    Args:
        target: a folder, or a repository of the Hub as ``organization/name``.
        revision: branch, tag or commit of a repository; default ``main``.
        endpoint: default ``HF_ENDPOINT``, then the public Hub.
        token: None takes the one that huggingface_hub finds, False sends none.
        wrapper: keys above the tensors that are taken from pickles with several sets of tensors.

    Raises:
        InspectError: it is neither, or holds no model.
        DownloadError: the repository does not exist, may not be seen, or cannot be reached.
        OptionalDependencyError: vLLM-Omni, diffusers or transformers is needed for the answer and not installed.
    """
    with open_listing(target, revision, endpoint, token) as listing:
        _require_model(listing)
        documents = Documents(listing)
        _each(listing, documents.object, [path for path in listing.files if _is_config(path)])
        files = _read_all(listing, wrapper)
        components = find_components(documents, files)
        classification = classify(documents, components)
        return Inspection(
            target=target,
            commit=listing.commit,
            path=classification.path,
            evidence=classification.evidence,
            files=len(listing.files),
            size=sum(listing.files.values()),
            class_name=classification.class_name,
            components=tuple(components),
            gate=listing.gate,
            card=read_model_card(documents.text("README.md")),
            missing=tuple(find_missing_files(documents, classification, components, files)),
            pitfalls=tuple(find_pitfalls(documents, classification, components, files)),
            memory=_memory(components),
            next=_next_step(target, listing, classification, components, files),
        )


def _require_model(listing: FileListing) -> None:
    if not any(is_weights(path) or _is_config(path) for path in listing.files):
        raise InspectError(
            f"{listing.name} holds {len(listing.files)} files, none of them weights or a model's configuration",
            code="inspect_empty",
            hint="name the repository or folder that has the weights",
            files=list(listing.files)[:20],
        )


def _is_config(path: str) -> bool:
    return path.rpartition("/")[2] in (*INDEXES, *CONFIGS)


def _read_all(listing: FileListing, wrapper: str) -> dict[str, WeightFile]:
    paths = [path for path in listing.files if is_weights(path)]
    return dict(zip(paths, _each(listing, lambda path: read_weights(listing, path, wrapper), paths), strict=True))


def _each(listing: FileListing, read: Callable[[str], _T], paths: list[str]) -> list[_T]:
    """Read files of a repository over several connections, or files of a folder in sequence."""
    with ThreadPoolExecutor(_CONNECTIONS if listing.commit else 1) as pool:
        return list(pool.map(read, paths))


def _memory(components: list[Component]) -> Memory | None:
    """Weights alone; of a model in one piece the largest component stands for the transformer."""
    if not any(part.parameters for part in components):
        return None
    named = [part for part in components if part.parameters and denoises(part)]
    sharded = named or [max(components, key=lambda part: part.parameters)]
    divided = 2 * sum(part.parameters for part in sharded)
    total = 2 * sum(part.parameters for part in components)
    return Memory(
        stored=sum(part.size for part in components),
        bfloat16=total,
        per_rank={ranks: -(-divided // ranks) + total - divided for ranks in _RANKS},
        sharded=tuple(part.name for part in sharded),
    )


def _next_step(
    target: str,
    listing: FileListing,
    classification: Classification,
    components: list[Component],
    files: dict[str, WeightFile],
) -> str:
    quoted = shlex.quote(target)
    if listing.gate:
        return f"accept the terms, then: hf auth login && port-kit inspect {quoted}"
    if any(file.format == "lfs pointer" for file in files.values()):
        return f"git -C {quoted} lfs pull && port-kit inspect {quoted}"
    if classification.path == "supported":
        return f"vllm serve {quoted} --omni"
    if classification.port:
        return f"port-kit download {classification.port}"
    weights = [file for part in components for file in part.weights]
    if weights and all(file.obstacle for file in weights):
        return f"replace {weights[0].path} ({weights[0].obstacle}), then: port-kit inspect {quoted}"
    transformer = next((part.class_name for part in components if is_denoiser(part.name)), "")
    return next_command(target, classification.path, transformer)
