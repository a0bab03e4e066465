"""Tiny checkpoints in the exact formats of the real ones: scaled manifests, seeded values, original containers.

A full-size checkpoint is described by its *outline*, names with shell-like braces, because that is short enough to
read and to keep::

    {"blocks.{0..29}.attn.{q,k,v}.weight": [[3072, 3072], "float32"]}

:func:`expand` gives its tensors, :func:`scale` shrinks them so that all relations between sizes stay (a fused width
of three times the hidden one is that of the tiny model too), :func:`fill` gives seeded values that a network can
compute with, and :func:`tiny_repositories` lays the files out as the Hub repositories that a recipe takes them from.
A JSON manifest of one's own checkpoint (``port-kit manifest``) has the same form without braces.

Importing this module needs no torch.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from port_kit.download import FileRule, Recipe
from port_kit.errors import PortKitError
from port_kit.escape import quoted
from port_kit.port import resolve
from port_kit.testing.tokenizer import write_tokenizer

if TYPE_CHECKING:
    import torch

#: ``{name: (shape, dtype)}``; the dtype in safetensors' words, lower case (``float32``, ``bfloat16``).
Tensors = dict[str, tuple[tuple[int, ...], str]]

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


@dataclass(frozen=True)
class TinyComponent:
    """Scaled-down description of one component.

    Attributes:
        outline: the full-size checkpoint, as :func:`expand` takes it.
        sizes: ``{full-size extent: tiny extent}``; see :func:`scale`.
        layers: ``{name of a module list: how many of its first entries stay}``.
        config: replacements for keys of the component's full-size ``config.json``.
    """

    outline: Mapping[str, Any]
    sizes: Mapping[int, int]
    layers: Mapping[str, int] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)

    def tensors(self, seed: int = 0) -> dict[str, torch.Tensor]:
        """Return the tiny checkpoint."""
        return fill(scale(expand(self.outline), sizes=self.sizes, layers=self.layers), seed=seed)


@dataclass(frozen=True)
class TinyPretrained:
    """A tiny part that its own library writes with ``save_pretrained``.

    Attributes:
        source: ``"module:Class"`` of diffusers or transformers.
        config: of the tiny part.
    """

    source: str
    config: Mapping[str, Any]

    def build(self, seed: int = 0) -> Any:
        """Return the part; no value is left as it was initialized, which would hide a lost weight."""
        source: Any = resolve(self.source)
        config_class = getattr(source, "config_class", None)
        part = source(config_class(**self.config)) if config_class is not None else source(**self.config)
        if hasattr(part, "state_dict"):
            state = {name: value for name, value in part.state_dict().items() if value.is_floating_point()}
            shapes = {name: (tuple(value.shape), "float32") for name, value in state.items()}
            part.load_state_dict(fill(shapes, seed=seed), strict=False)
        return part

    def write(self, folder: Path, seed: int) -> None:
        """Write the part's files."""
        self.build(seed).save_pretrained(folder)


@dataclass(frozen=True)
class TinyTokenizer:
    """A tiny tokenizer.

    Attributes:
        size: entries of the vocabulary.
        words: that are one piece each.
    """

    size: int
    words: tuple[str, ...] = ()

    def write(self, folder: Path, seed: int) -> None:
        """Write the tokenizer's files."""
        write_tokenizer(folder, size=self.size, seed=seed, words=self.words)


TinyPart = TinyComponent | TinyPretrained | TinyTokenizer


@dataclass(frozen=True)
class TinyModel:
    """A tiny model as it would lie on the Hub.

    Attributes:
        repositories: ``{repository id: {path in the repository: file}}``, content for a loopback Hub.
        configs: ``{component: config.json}`` of the tiny sizes, for ``recipe.with_(configs=...)``.
        model_index: changes of the tiny sizes to ``model_index.json``.
        files: rules of its files if they have other names than those of the full-size model.
    """

    repositories: dict[str, dict[str, Path]]
    configs: dict[str, dict[str, Any]]
    model_index: dict[str, Any] = field(default_factory=dict)
    files: tuple[FileRule, ...] = ()

    def recipe(self, full_size: Recipe) -> Recipe:
        """Return the recipe of the full-size model for the tiny one."""
        recipe = full_size.with_(configs=self.configs, model_index=self.model_index)
        if not self.files:
            return recipe
        return replace(recipe, repositories=tuple(replace(each, files=self.files) for each in recipe.repositories))


def expand(outline: Mapping[str, Any]) -> Tensors:
    """Return the tensors of an outline: every combination of ``{a,b}`` and ``{0..9}``; a manifest is one already.

    Raises:
        PortKitError: two entries give the same name.
    """
    tensors: Tensors = {}
    for pattern, (shape, dtype) in outline.items():
        for name in _names(pattern):
            if name in tensors:
                raise PortKitError(
                    f"outline gives {quoted(name)} twice, the second time by {quoted(pattern)}", code="outline_invalid"
                )
            tensors[name] = (tuple(shape), dtype)
    return tensors


def _names(pattern: str) -> Iterator[str]:
    pieces = _BRACES.split(pattern)  # literal, alternatives, literal, alternatives, ...
    choices = [_alternatives(piece) if index % 2 else [piece] for index, piece in enumerate(pieces)]
    return ("".join(choice) for choice in itertools.product(*choices))


def _alternatives(text: str) -> list[str]:
    span = _RANGE.fullmatch(text)
    if span is None:
        return text.split(",")
    return [str(number) for number in range(int(span[1]), int(span[2]) + 1)]


def scale(tensors: Tensors, *, sizes: Mapping[int, int], layers: Mapping[str, int] | None = None) -> Tensors:
    """Shrink a checkpoint.

    Args:
        tensors: the full-size one.
        sizes: ``{3072: 64}`` turns every extent of 3072 into 64 and every multiple of it (a fused 9216) into the same
            multiple of 64. An extent that is listed itself is taken before multiples, and larger sizes before
            smaller ones. Other extents (kernels, channels of images) stay.
        layers: ``{"blocks": 2}`` keeps ``blocks.0`` and ``blocks.1`` wherever that list is in a name.
    """
    limits = layers or {}
    return {
        name: (tuple(_extent(extent, sizes) for extent in shape), dtype)
        for name, (shape, dtype) in tensors.items()
        if _is_kept(name, limits)
    }


def _extent(extent: int, sizes: Mapping[int, int]) -> int:
    if extent in sizes:
        return sizes[extent]
    for full in sorted(sizes, reverse=True):
        if extent % full == 0:
            return extent // full * sizes[full]
    return extent


def _is_kept(name: str, layers: Mapping[str, int]) -> bool:
    segments = name.split(".")
    return not any(
        owner in layers and index.isdigit() and int(index) >= layers[owner]
        for owner, index in itertools.pairwise(segments)
    )


def fill(tensors: Tensors, *, seed: int = 0, device: str = "cpu") -> dict[str, torch.Tensor]:
    """Give every tensor seeded values of the kind that its name promises (a norm near 1, a filter of sum 1).

    A tensor's values depend on its name, its shape, the seed and the kind of device only, so that taking one away
    changes no other.
    """
    import torch

    filled: dict[str, torch.Tensor] = {}
    for name, (shape, dtype) in tensors.items():
        generator = torch.Generator(device).manual_seed(_seed(name, seed))
        values = _rule(name)(torch.randn(shape, generator=generator, device=device, dtype=torch.float32))
        filled[name] = values.to(getattr(torch, dtype)).contiguous()
    return filled


def _seed(name: str, seed: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:6], "little")


def _matrix(noise: torch.Tensor) -> torch.Tensor:
    """Scale to the width that is summed over, so that activations keep their size."""
    fan_in = math.prod(noise.shape[1:]) if noise.ndim > 1 else 1
    return noise * fan_in**-0.5


def _window(noise: torch.Tensor) -> torch.Tensor:
    """Return a low-pass filter: a smooth positive window of sum 1."""
    import torch

    window = torch.hann_window(noise.shape[-1] + 2, periodic=False, device=noise.device)[1:-1]
    return (window / window.sum()).expand(noise.shape)


#: The first pattern that matches a name selects the distribution; matrices if none is.
_RULES: tuple[tuple[re.Pattern[str], Callable[[torch.Tensor], torch.Tensor]], ...] = (
    (re.compile(r"norm\w*\.weight$|gamma$|weight_g$|original0$"), lambda noise: 1 + 0.1 * noise.abs()),
    (re.compile(r"_std$|running_var$"), lambda noise: 1 + 0.1 * noise.abs()),
    (re.compile(r"filter$"), _window),
    (re.compile(r"learnable_gain$"), lambda noise: 0 * noise),
    (re.compile(r"bias$|_mean$|alpha$|beta$"), lambda noise: 0.05 * noise),
    (re.compile(r"modulation$"), lambda noise: 0.2 * noise),
    (re.compile(r"embedding\.weight$"), lambda noise: noise),
)


def _rule(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    return next((rule for pattern, rule in _RULES if pattern.search(name)), _matrix)


def write_checkpoint(path: Path, tensors: Mapping[str, torch.Tensor], *, wrapper: str = "") -> None:
    """Write tensors in the container that the file's suffix selects.

    Args:
        path: ``.safetensors`` or ``.sft``, or a pickle checkpoint (``.pth``, ``.pt``, ``.bin``, ``.ckpt``) as torch
            writes it.
        tensors: by name.
        wrapper: the keys above the tensors in a pickle, dotted (``generator``, ``app.model``).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix.lower() in (".safetensors", ".sft"):
        from safetensors.torch import save_file

        save_file(dict(tensors), path)
        return
    import torch

    content: dict[str, Any] = dict(tensors)
    for key in reversed(wrapper.split(".") if wrapper else []):
        content = {key: content}
    torch.save(content, path)


def tiny_repositories(
    recipe: Recipe,
    parts: Mapping[str, TinyPart],
    folder: Path,
    *,
    seed: int = 0,
) -> TinyModel:
    """Write a tiny model and lay it out as the repositories that the recipe takes it from.

    Args:
        recipe: says which file of which repository holds a component, in which container and under which wrapper.
        parts: by folder of the model directory.
        folder: the files are written to ``folder/<repository id>/<path>``.
        seed: of all values.

    Raises:
        PortKitError: the recipe fills a folder for which no part is given.
    """
    repositories: dict[str, dict[str, Path]] = {}
    for repository in recipe.repositories:
        root = folder / repository.repo_id
        files = repositories.setdefault(repository.repo_id, {})
        written: set[str] = set()
        for rule in repository.files:
            path = root / _any_match(rule.pattern)
            if rule.folder not in written:
                _write_part(rule.folder, parts, path, rule.wrapper, seed)
            written.add(rule.folder)
            own = [path] if isinstance(parts[rule.folder], TinyComponent) else sorted(path.parent.iterdir())
            files.update({file.relative_to(root).as_posix(): file for file in own if file.is_file()})
    configs = {
        name: {**recipe.configs[name], **part.config}
        for name, part in parts.items()
        if name in recipe.configs and isinstance(part, TinyComponent)
    }
    return TinyModel(repositories, configs)


def _any_match(pattern: str) -> str:
    """Return a path that a recipe's pattern matches."""
    return re.sub(r"\[(.)\]", r"\1", pattern.replace("*", "00001"))


def _write_part(
    name: str,
    parts: Mapping[str, TinyPart],
    path: Path,
    wrapper: str,
    seed: int,
) -> None:
    """Write a part: a component to the path, another part to its folder."""
    part = parts.get(name)
    if part is None:
        raise PortKitError(
            f"the recipe fills the folder {quoted(name)}, for which no tiny part is given",
            code="outline_invalid",
            hint="add a TinyComponent (tensors), TinyPretrained or TinyTokenizer of that name",
        )
    if isinstance(part, TinyComponent):
        write_checkpoint(path, part.tensors(seed), wrapper=wrapper)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part.write(path.parent, seed)


def tiny_part(reference: str, name: str, prefix: str = "") -> TinyPart:
    """Return a tiny part that another port shares.

    Args:
        reference: ``"module:attribute"`` of a mapping from folders to parts.
        name: the folder.
        prefix: in front of the names in the checkpoint.
    """
    parts: Any = resolve(reference)
    part: TinyPart = parts[name]
    if not isinstance(part, TinyComponent) or not prefix:
        return part
    return replace(part, outline={f"{prefix}{pattern}": entry for pattern, entry in part.outline.items()})


def read_outline(path: Path) -> dict[str, Any]:
    """Read an outline or a manifest from JSON."""
    return json.loads(path.read_text(encoding="utf-8"))
