"""Names and tensors as mapped by transformers and vLLM themselves, and names that match a list of patterns."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from re import _constants as sre  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

import torch
from transformers.core_model_loading import WeightConverter, dot_natural_key, rename_source_key

from port_kit.remap import RuleSet
from port_kit.remap.export import convert
from tests.remap.loader_equivalence import manifest_of

Tensors = dict[str, torch.Tensor]


def numbered(names: Sequence[str], shape: Sequence[int] = (12, 4)) -> Tensors:
    """Tensors of one shape in which every element is different."""
    size = torch.Size(shape).numel()
    return {name: torch.arange(at * size, (at + 1) * size).view(*shape) for at, name in enumerate(names)}


def by_transformers(transforms: Sequence[Any], tensors: Tensors) -> Tensors:
    """Convert a checkpoint as transformers' loader does, with its own renaming and its own ops.

    Raises:
        FileExistsError: two names lead to one target; its argument is the second.
    """
    transforms = deepcopy(list(transforms))
    converters = [item for item in transforms if isinstance(item, WeightConverter)]
    renamings = [item for item in transforms if not isinstance(item, WeightConverter)]
    owners = {pattern: item for item in converters for pattern in item.source_patterns}
    pending: dict[str, WeightConverter] = {}
    made: Tensors = {}
    for name in sorted(tensors, key=dot_natural_key):
        renamed, pattern = rename_source_key(name, renamings, converters)
        if pattern is None:
            if renamed in made:
                raise FileExistsError(name)
            made[renamed] = tensors[name]
        else:
            pending.setdefault(renamed, deepcopy(owners[pattern])).add_tensor(renamed, name, pattern, tensors[name])
    for renamed, converter in pending.items():
        for name, value in converter.convert(renamed).items():
            made[name] = value[0] if isinstance(value, list) else value
    return made


def by_rules(rules: RuleSet, tensors: Tensors, target: Tensors) -> Tensors:
    """Convert a checkpoint by rules, to the names and shapes of the other library's result."""
    return dict(convert(rules.compile(manifest_of(tensors), manifest_of(target)), tensors))


def assert_same(got: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """Assert equal names, shapes and values."""
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].shape == tensor.shape and torch.equal(got[name], tensor), name


def names_for(transforms: Sequence[Any], layers: int = 2) -> list[str]:
    """Names that the source patterns match, in two layers, one for each branch of a pattern."""
    names: dict[str, None] = {"other.0.weight": None, "model.layers.1.other.bias": None}
    for item in transforms:
        for pattern in item.source_patterns:
            for layer in range(layers):
                for way in range(3):
                    text = _sample(parser.parse(pattern.replace(".*.", r"\..*\.")), layer, way)
                    before = "" if pattern.startswith("^") else f"model.layers.{layer}."
                    after = "" if text.endswith(("weight", "bias")) else "weight" if text.endswith(".") else ".weight"
                    names[before + text.lstrip(".") + after] = None
    return list(names)


def _sample(tree: Any, number: int, way: int) -> str:
    text = ""
    for code, value in tree:
        if code is sre.LITERAL:
            text += chr(value)
        elif code is sre.SUBPATTERN:
            text += _sample(value[3], number, way)
        elif code is sre.BRANCH:
            text += _sample(value[1][way % len(value[1])], number, way)
        elif code in (sre.MAX_REPEAT, sre.MIN_REPEAT):
            text += str(number)
        elif code is sre.IN:
            text += chr(value[0][1]) if value[0][0] is sre.LITERAL else str(number)
        elif code is sre.ANY:
            text += "."
    return text


def mapped(rules: RuleSet, name: str) -> list[tuple[str, str]]:
    """Target and shard of each rule for a name; none if it is dropped. Exactly one pattern must match."""
    found = [(rule, match) for rule in rules if (match := re.fullmatch(rule.source, name))]
    found = [pair for pair in found if not pair[0].fallback] or found
    assert len({rule.source for rule, _ in found}) == 1, name
    texts = [(match.expand(rule.targets[0]), match.expand(rule.shards[0])) for rule, match in found if not rule.drop]
    return [(re.sub(r"\\([{}])", r"\1", target), shard) for target, shard in texts]


def by_vllm(mapper: Any, name: str) -> list[tuple[str, str]]:
    """Target and shard that a ``WeightsMapper`` gives a name; none if it is dropped."""
    tensor = torch.empty(0)
    return [(target, str(getattr(tensor, "shard_id", ""))) for target, _ in mapper.apply([(name, tensor)])]
