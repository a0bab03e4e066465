"""Put an inspection together: listing, headers, card, verdict, what is missing, memory, next step."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from port_kit.errors import InspectError
from port_kit.inspect.card import read_card
from port_kit.inspect.components import CONFIGS, INDEXES, find_components
from port_kit.inspect.documents import Documents
from port_kit.inspect.naming import new_command
from port_kit.inspect.needs import missing
from port_kit.inspect.report import Component, Inspection, Memory, WeightFile
from port_kit.inspect.traps import traps
from port_kit.inspect.trees import Tree, open_tree
from port_kit.inspect.verdict import Verdict, judge
from port_kit.inspect.weights import is_weights, read_weights

_T = TypeVar("_T")
_CONNECTIONS = 8
_RANKS = (1, 2, 4, 8)


def inspect(
    target: str, *, revision: str | None = None, endpoint: str | None = None, token: str | bool | None = None
) -> Inspection:
    """Say what a repository or folder is to vLLM-Omni, from its listing, its small texts and its headers.

    No file of weights is downloaded, nothing of it is executed, and neither torch nor vLLM-Omni is imported.

    Args:
        target: a folder, or a repository of the Hub as ``organisation/name``.
        revision: branch, tag or commit of a repository; default ``main``.
        endpoint: default ``HF_ENDPOINT``, then the public Hub.
        token: None takes the one that huggingface_hub finds, False sends none.

    Raises:
        InspectError: it is neither, or holds no model.
        DownloadError: the repository does not exist, may not be seen, or cannot be reached.
        OptionalDependencyError: vLLM-Omni, diffusers or transformers is needed for the answer and not installed.
    """
    with open_tree(target, revision, endpoint, token) as tree:
        _require_model(tree)
        documents = Documents(tree)
        _each(tree, documents.object, [path for path in tree.files if _is_config(path)])
        files = _read_all(tree)
        components = find_components(documents, files)
        verdict = judge(documents, components)
        return Inspection(
            target=target,
            commit=tree.commit,
            path=verdict.path,
            evidence=verdict.evidence,
            files=len(tree.files),
            size=sum(tree.files.values()),
            class_name=verdict.class_name,
            components=tuple(components),
            gate=tree.gate,
            card=read_card(documents.text("README.md")),
            missing=tuple(missing(documents, verdict, components, files)),
            traps=tuple(traps(documents, verdict, components, files)),
            memory=_memory(components),
            next=_next_step(target, tree, verdict, components, files),
        )


def _require_model(tree: Tree) -> None:
    if not any(is_weights(path) or _is_config(path) for path in tree.files):
        raise InspectError(
            f"{tree.name} holds {len(tree.files)} files, none of them weights or a model's configuration",
            code="inspect_empty",
            hint="name the repository or folder that has the weights",
            files=list(tree.files)[:20],
        )


def _is_config(path: str) -> bool:
    return path.rpartition("/")[2] in (*INDEXES, *CONFIGS)


def _read_all(tree: Tree) -> dict[str, WeightFile]:
    paths = [path for path in tree.files if is_weights(path)]
    return dict(zip(paths, _each(tree, lambda path: read_weights(tree, path), paths), strict=True))


def _each(tree: Tree, read: Callable[[str], _T], paths: list[str]) -> list[_T]:
    """Read files of a repository over several connections, as each costs a round trip; those of a folder in turn."""
    with ThreadPoolExecutor(_CONNECTIONS if tree.commit else 1) as pool:
        return list(pool.map(read, paths))


def _memory(components: list[Component]) -> Memory | None:
    """Weights alone; of a model in one piece the largest component stands for the transformer."""
    if not any(part.parameters for part in components):
        return None
    named = [part for part in components if part.name.startswith(("transformer", "unet"))]
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
    target: str, tree: Tree, verdict: Verdict, components: list[Component], files: dict[str, WeightFile]
) -> str:
    quoted = shlex.quote(target)
    if tree.gate:
        return f"accept the terms, then: hf auth login && port-kit inspect {quoted}"
    if any(file.format == "lfs pointer" for file in files.values()):
        return f"git -C {quoted} lfs pull && port-kit inspect {quoted}"
    if verdict.path == "supported":
        return f"vllm serve {quoted} --omni"
    if verdict.port:
        return f"port-kit download {verdict.port}"
    transformer = next((part.class_name for part in components if part.name == "transformer"), "")
    return new_command(target, verdict.path, verdict.class_name, transformer)
