"""LoRA files by the rules of their base model: adapters are renamed, never computed.

An adapter belongs to a module, so its names follow those of the module's weight. Parts of a fused projection keep names
of their own (``self_attn.q`` beside ``self_attn.k``), as vLLM-Omni's LoRA manager wants them together with
:func:`port_kit.remap.mapper.stacked_params_mapping`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

from port_kit.remap.mapper import NameMapper
from port_kit.remap.matching import Matcher
from port_kit.remap.problems import Problem, nearest, raise_problems
from port_kit.remap.rules import Rule, RuleSet

Value = TypeVar("Value")

#: What stands before the module in files of PEFT, diffusers and kohya-style trainers.
PREFIXES = ("base_model.model.", "diffusion_model.", "transformer.", "")
_ADAPTER = re.compile(r"(.+?)\.(lora_(?:A|B|up|down|embedding_[AB])(?:\.\w+)?(?:\.weight)?|alpha|dora_scale|diff_b?)")
#: What stands before a module in kohya's files, where the dots of the module are underscores.
FLAT_PREFIXES = ("lora_unet_", "lora_transformer_", "lora_dit_")
#: Ops that change which elements a module's weight has or where: an adapter cannot follow a rename through them.
_MOVING = ("split", "concat", "stack", "reorder", "rearrange", "transpose")


def remap_lora(
    tensors: Mapping[str, Value],
    rules: RuleSet,
    *,
    sizes: Mapping[str, int] | None = None,
    prefixes: Iterable[str] = PREFIXES,
) -> dict[str, Value]:
    """Return a LoRA file's tensors under the names of the port's modules; values are not touched.

    Args:
        tensors: the file's tensors by name.
        rules: the rule set of the base model's component.
        sizes: named sizes, as for loading.
        prefixes: what may stand before a module's name; the first under which the rules know it is taken off.

    Raises:
        RemapError: ``remap_unexpected`` for an adapter of a module that the rules do not know or drop, ``remap_op`` for
            one whose weight they rearrange, ``remap_collision`` for two that get one name.
    """
    mapper, matcher = NameMapper(rules, sizes).get_rename_mapper(), Matcher(rules.rules)
    renamed: dict[str, Value] = {}
    problems: list[Problem] = []
    for name, value in tensors.items():
        found = _ADAPTER.fullmatch(name)
        module = _module(found[1], matcher, tuple(prefixes)) if found is not None else None
        if found is None or module is None:
            near = nearest(name, [rule.source for rule in rules])
            message = f"{name} belongs to no module that {rules.name} maps"
            problems.append(Problem("remap_unexpected", message, source=name, near=near))
            continue
        rule = rules.rules[matcher.find(f"{module}.weight")[0]]
        problem = _obstacle(name, rule)
        mapped = mapper.map(f"{module}.weight")
        assert mapped is not None
        target = f"{mapped[0].removesuffix('.weight')}.{found[2]}"
        if target in renamed:
            problem = Problem("remap_collision", f"{name} and another adapter are both {target}", rule.label, name)
        if problem is not None:
            problems.append(problem)
        renamed[target] = value
    raise_problems(problems, f"{rules.name} does not map the LoRA file")
    return renamed


def unflatten(tensors: Mapping[str, Value], modules: Iterable[str]) -> dict[str, Value]:
    """Return a LoRA file's tensors with the dots put back that kohya's trainers write as underscores.

    Args:
        tensors: by name; names without one of :data:`FLAT_PREFIXES`, or of no known module, stay as they are.
        modules: names of the base model's modules, as its checkpoint has them.
    """
    known = {module.replace(".", "_"): module for module in modules}

    def dotted(name: str) -> str:
        module, dot, rest = name.partition(".")
        for prefix in FLAT_PREFIXES:
            if module.startswith(prefix):
                return known.get(module.removeprefix(prefix), module) + dot + rest
        return name

    return {dotted(name): value for name, value in tensors.items()}


def _module(name: str, matcher: Matcher, prefixes: tuple[str, ...]) -> str | None:
    for prefix in prefixes:
        bare = name.removeprefix(prefix) if name.startswith(prefix) else None
        if bare is None:
            continue
        found = matcher.find(f"{bare}.weight")
        if found and not matcher.rules[found[0]].drop:
            return bare
    return None


def _obstacle(name: str, rule: Rule) -> Problem | None:
    moving = [op.name for op in rule.op if op.name in _MOVING]
    if not moving and not rule.take and not rule.into:
        return None
    message = f"{name} adapts a weight that is rearranged on loading ({', '.join(moving) or 'a part of it'})"
    return Problem("remap_op", message, rule.label, name)
