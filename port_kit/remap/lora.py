"""LoRA files by the rules of their base model: adapters take the names of the port's modules.

An adapter belongs to a module, so its names follow those of the module's weight. Parts of a fused projection keep names
of their own (``self_attn.q`` beside ``self_attn.k``), as vLLM-Omni's LoRA manager wants them together with
:func:`port_kit.remap.mapper.stacked_params_mapping`. Where loading splits a weight by rows, or puts its rows in another
order, every part gets its rows of B and the whole of A; by columns, its columns of A and the whole of B.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from port_kit.errors import RemapError
from port_kit.manifest import TensorSpec
from port_kit.remap.boxes import Shape, whole
from port_kit.remap.lower import Lowering, Write
from port_kit.remap.mapper import NameMapper
from port_kit.remap.matching import Matcher
from port_kit.remap.problems import Problem, nearest, problem_from, raise_problems
from port_kit.remap.rules import Rule, RuleSet
from port_kit.remap.steps import Cast, Permute, Reorder, Reshape, Step, Take, gather

Value = TypeVar("Value")

#: What stands before the module in files of PEFT, diffusers and kohya-style trainers.
PREFIXES = ("base_model.model.", "diffusion_model.", "transformer.", "")
_ADAPTER = re.compile(r"(.+?)\.(lora_(?:A|B|up|down|embedding_[AB])(?:\.\w+)?(?:\.weight)?|alpha|dora_scale|diff_b?)")
#: What stands before a module in kohya's files, where the dots of the module are underscores.
FLAT_PREFIXES = ("lora_unet_", "lora_transformer_", "lora_dit_")
#: The two matrices by the words of trainers: A is (rank, inputs), B is (outputs, rank).
_MATRICES = {"lora_A": "A", "lora_down": "A", "lora_B": "B", "lora_up": "B"}
#: Ops that change which elements a module's weight has or where: a rename alone does not follow them.
_MOVING = ("split", "concat", "stack", "reorder", "rearrange", "transpose")


def remap_lora(
    tensors: Mapping[str, Value],
    rules: RuleSet,
    *,
    sizes: Mapping[str, int] | None = None,
    prefixes: Iterable[str] = PREFIXES,
    target: Mapping[str, TensorSpec] | None = None,
    parts: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, Value]:
    """Return a LoRA file's tensors under the names of the port's modules.

    Values are not touched, but for adapters of weights that loading splits: those give parts, which are views.

    Args:
        tensors: the file's tensors by name.
        rules: the rule set of the base model's component.
        sizes: named sizes, as for loading.
        prefixes: what may stand before a module's name; the first under which the rules know it is taken off.
        target: the manifest of the port's module; without it, adapters of weights that loading splits are refused.
        parts: what the parts of a fused module are called, in the order of its slots: the module's
            ``packed_modules_mapping``. A part that is not in it is called by its slot, or ``module_slot`` where that is
            a number.

    Raises:
        RemapError: ``remap_unexpected`` for an adapter of a module that the rules do not know or drop, ``remap_op`` for
            one that cannot follow what they do with the weight, ``remap_collision`` for two that get one name.
    """
    mapper, matcher = NameMapper(rules, sizes).get_rename_mapper(), Matcher(rules.rules)
    renamed: dict[str, Value] = {}
    problems: list[Problem] = []
    moved: dict[str, dict[str, tuple[str, Any]]] = {}
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
        if problem is not None and target is not None:
            moved.setdefault(module, {})[found[2]] = (name, value)
            continue
        mapped = mapper.map(f"{module}.weight")
        assert mapped is not None
        new = f"{mapped[0].removesuffix('.weight')}.{found[2]}"
        problems += [problem] if problem is not None else _put(renamed, new, name, value, rule)
    if moved and target is not None:
        lowering = Lowering(rules, target, sizes or {}, narrow=True)
        for module, adapter in moved.items():
            try:
                for new, name, value in split_adapter(module, adapter, lowering, parts or {}):
                    problems += _put(renamed, new, name, value, None)
            except RemapError as error:
                problems.append(problem_from(error, source=next(iter(adapter.values()))[0]))
    raise_problems(problems, f"{rules.name} does not map the LoRA file")
    return renamed


def _put(renamed: dict[str, Value], new: str, name: str, value: Value, rule: Rule | None) -> list[Problem]:
    if new in renamed:
        label = rule.label if rule is not None else ""
        return [Problem("remap_collision", f"{name} and another adapter are both {new}", label, name)]
    renamed[new] = value
    return []


def split_adapter(
    module: str, adapter: Mapping[str, tuple[str, Any]], lowering: Lowering, parts: Mapping[str, Sequence[str]]
) -> Iterator[tuple[str, str, Any]]:
    """The parts of an adapter whose weight goes to several places, or changes the order of its rows or columns.

    Args:
        module: the adapted module by its original name.
        adapter: ``{what it is: (name, tensor)}``.
        lowering: the rules and the port's module.
        parts: as for :func:`remap_lora`.

    Yields:
        ``(new name, name, tensor)``.

    Raises:
        RemapError: ``remap_op`` where the adapter is incomplete or cannot follow; what the rules say of the weight.
    """
    kinds = {what: _MATRICES.get(what.split(".")[0], what) for what in adapter}
    known = {kinds[what]: tensor for what, (_, tensor) in adapter.items()}
    strange = [name for what, (name, _) in adapter.items() if kinds[what] not in ("A", "B", "alpha")]
    if strange or not {"A", "B"} <= set(known) or known["A"].ndim != 2 or known["B"].ndim != 2:
        shown = ", ".join(strange) or f"{module} has {', '.join(name for name, _ in adapter.values())}"
        raise _cannot_follow(
            f"{shown}: the weight is rearranged on loading, which matrices A and B of two axes each can follow"
        )
    shape = (known["B"].shape[0], known["A"].shape[1])
    found = lowering.lower(f"{module}.weight", TensorSpec(shape, "bfloat16"))
    raise_problems(
        list(found.problems),
        f"{module} is rearranged on loading, and an adapter of {shape[0]} x {shape[1]} does not fit it",
    )
    for write in found.writes:
        steps = {kind: _along(write, lowering.target[write.target], shape, known[kind], kind) for kind in "AB"}
        followed = [kind for kind in "BA" if steps[kind] is not None]
        if not followed:
            raise _cannot_follow(f"{module} is rearranged on loading in more than its rows, or more than its columns")
        new = _part_name(write, lowering.target[write.target], parts)
        for what, (name, tensor) in adapter.items():
            follows = steps[followed[0]] if kinds[what] == followed[0] else None
            yield f"{new}.{what}", name, tensor if follows is None else gather(tensor, follows)


def _along(write: Write, spec: TensorSpec, shape: Shape, matrix: Any, kind: str) -> list[Step] | None:
    """A write's steps for a matrix that has its rows (B) or its columns (A); None where they touch the other axis."""
    other, rank = (1, matrix.shape[1]) if kind == "B" else (0, matrix.shape[0])
    size = shape[other]
    if write.join is not None or len(spec.shape) != 2 or write.region != spec.slots.get(write.slot, whole(spec.shape)):
        return None

    def with_rank(extents: Shape) -> Shape:
        return (*extents[:-1], rank) if other else (rank, *extents[1:])

    moved: list[Step] = []
    for step in write.steps:
        at = -1 if other else 0
        if not step.before or not step.after or step.before[at] != size or step.after[at] != size:
            return None
        if isinstance(step, Take) and step.box[at] == (0, size):
            box = (*step.box[:-1], (0, rank)) if other else ((0, rank), *step.box[1:])
            moved.append(Take(box, with_rank(step.before)))
        elif isinstance(step, Reorder) and step.dim != at % len(step.before):
            moved.append(Reorder(step.dim, step.runs, with_rank(step.before)))
        elif isinstance(step, Permute) and step.perm[at] == at % len(step.before):
            moved.append(Permute(step.perm, with_rank(step.before)))
        elif isinstance(step, Reshape):  # the elements of the other axis stay together: only the rest is counted anew
            moved.append(Reshape(with_rank(step.before), with_rank(step.after)))
        elif not isinstance(step, Cast):
            return None
    return moved


def _part_name(write: Write, spec: TensorSpec, parts: Mapping[str, Sequence[str]]) -> str:
    module = write.target.removesuffix(".weight")
    if not write.slot:
        return module
    parent, dot, leaf = module.rpartition(".")
    own = f"{leaf}_{write.slot}" if write.slot.isdecimal() else write.slot
    names, at = parts.get(leaf, ()), list(spec.slots).index(write.slot)
    return f"{parent}{dot}{names[at] if at < len(names) else own}"


def _cannot_follow(message: str) -> RemapError:
    return RemapError(message, code="remap_op", hint="merge the adapter into the base model's weights before loading")


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
    message += "; the manifest of the module is required to follow"
    return Problem("remap_op", message, rule.label, name)
