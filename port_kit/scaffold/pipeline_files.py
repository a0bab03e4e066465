"""Files of a repository of diffusers that a model directory needs, as the rules of a recipe."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator

from port_kit.errors import ScaffoldError
from port_kit.inspect import Component
from port_kit.inspect.weights import is_weights
from port_kit.scaffold.render import literal
from port_kit.scaffold.source import Source

_SHARD = re.compile(r"-\d{5}(-of-\d{5})")


def file_rules(source: Source, folders: list[str]) -> str:
    """Return the rules of the folders' files, a line each.

    Raises:
        ScaffoldError: ``scaffold_unsupported``; weights are in no safetensors file.
    """
    rules = [(pattern, folder) for folder in folders for pattern in file_patterns(source, folder)]
    return "\n".join(f'                FileRule({literal(pattern)}, folder="{folder}"),' for pattern, folder in rules)


def file_patterns(source: Source, folder: str) -> tuple[str, ...]:
    """Return patterns of a component's files: configurations, and one variant of its weights.

    Raises:
        ScaffoldError: ``scaffold_unsupported``; weights are in no safetensors file.
    """
    part = source.inspection.component(folder) if source.inspection else None
    if part is None or not part.weights:
        return (f"{folder}/*",)
    others = (path for path in source.listed if path.startswith(f"{folder}/") and not is_weights(path))
    configs = (glob.escape(path) for path in others if not path.endswith(".index.json"))
    return tuple(dict.fromkeys((*configs, *_weights(part, source.listed))))


def _weights(part: Component, listed: tuple[str, ...]) -> Iterator[str]:
    for file in part.weights:
        if file.problem or file.format != "safetensors":
            raise ScaffoldError(
                f"{file.path} {file.problem or f'is {file.format}'}; diffusers' pipelines are loaded from safetensors",
                code="scaffold_unsupported",
                hint="name a repository that has the weights as safetensors",
            )
        index = f"{_SHARD.sub('', file.path)}.index.json"
        if index in listed:
            yield glob.escape(index)
        yield _SHARD.sub(r"-*\1", glob.escape(file.path))
