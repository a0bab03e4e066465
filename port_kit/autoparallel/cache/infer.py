"""Inference of Cache-DiT's forward patterns: the tensors that each block of a list changes and passes on.

A module is run with more image, text and audio tokens, and every block's arguments and results are recorded. A result
that is the next block's argument is a *state*. Hidden states are those whose tokens grow with the module's output. The
patterns are then tried: with equal inputs at all steps, a cached step returns what a computed step returns.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from port_kit.autoparallel.observe import block_paths
from port_kit.autoparallel.plan import Blocks, CacheState, Plan, generalize
from port_kit.autoparallel.streams import RUNS
from port_kit.autoparallel.subject import ModelScale, Subject, TokenScale
from port_kit.autoparallel.tree import Arguments, leaves
from port_kit.upstream.checks import require

require("tensor_version")

#: Configuration that is observed and tried: lists need a block between the first and the last one.
SCALE = ModelScale(depth=3)


@dataclass
class _Call:
    """One call of a block.

    Attributes:
        path: path of the block.
        inputs: tensors of its arguments, by path.
        outputs: tensors of its result, by path.
        effects: arguments that the call changed; a call that is skipped would not.
    """

    path: str
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    effects: list[str]

    @property
    def list(self) -> str:
        return generalize(self.path)


@dataclass
class _Run:
    """Calls of one run in order, and the shapes of its result."""

    calls: list[_Call]
    result: list[tuple[int, ...]]


class _Unfit(Exception):
    """A finding that excludes a list."""


def with_cache_patterns(subject: Subject, blocks: Iterable[Blocks]) -> tuple[Blocks, ...]:
    """Return the lists with their patterns, or with the finding that excludes them.

    Lists that fit alone but not together are reduced to the longest one.
    """
    model = subject.build(SCALE)
    runs = [_observe(subject, model, scale) for name, scale in RUNS.items() if name != "batch"]
    proposed = [_propose(model, entry, runs) for entry in blocks]
    proposed = _alternating(proposed, runs[0].calls)
    return tuple(_tried(subject, proposed, runs[0].calls))


def _observe(subject: Subject, model: nn.Module, tokens: TokenScale) -> _Run:
    calls: list[_Call] = []
    hooks = []
    for path in block_paths(model):
        hooks += _record(model.get_submodule(path), path, calls)
    try:
        with torch.no_grad():
            result = subject.output(model(**subject.inputs(tokens, SCALE)))
    finally:
        for hook in hooks:
            hook.remove()
    return _Run(calls, [tuple(tensor.shape) for tensor in result])


def _record(block: nn.Module, path: str, calls: list[_Call]) -> list[Any]:
    names = Arguments(block)
    entered: list[tuple[dict[str, Any], dict[str, Any]]] = []

    def enter(_module: nn.Module, args: Any, kwargs: Any) -> None:
        named = names.named(args, kwargs)
        entered.append((named, {name: _content(leaf) for name, leaf in leaves(named)}))

    def leave(_module: nn.Module, _args: Any, output: Any) -> None:
        named, before = entered.pop()
        after = {name: _content(leaf) for name, leaf in leaves(named)}
        effects = [name for name, content in before.items() if not _unchanged(content, after.get(name, ()))]
        calls.append(_Call(path, _tensors(named), _tensors(output), effects))

    return [block.register_forward_pre_hook(enter, with_kwargs=True), block.register_forward_hook(leave)]


def _content(value: Any, depth: int = 3) -> tuple[tuple[Any, int], ...]:
    """Return the values that an argument consists of, each with the number of its changes if it is a tensor."""
    if isinstance(value, Tensor):
        return ((value, value._version),)
    parts = [leaf for _, leaf in leaves(vars(value))] if depth and hasattr(value, "__dict__") else []
    return ((value, 0), *(one for part in parts for one in _content(part, depth - 1)))


def _unchanged(before: Sequence[tuple[Any, int]], after: Sequence[tuple[Any, int]]) -> bool:
    if len(before) != len(after):
        return False
    return all(one is other and count == now for (one, count), (other, now) in zip(before, after, strict=True))


def _tensors(value: Any) -> dict[str, Tensor]:
    return {path: leaf for path, leaf in leaves(value) if torch.is_tensor(leaf)}


def _propose(model: nn.Module, entry: Blocks, runs: Sequence[_Run]) -> Blocks:
    """Return a list with its states and pattern, or with a reason."""
    own = [[call for call in run.calls if call.list == entry.modules] for run in runs]
    try:
        states = _states(model, entry.modules, own, runs)
    except _Unfit as finding:
        return entry.model_copy(update={"cache_reason": str(finding)})
    pattern = _pattern(model.get_submodule(own[0][0].path), states, own)
    return entry.model_copy(update={"cache_pattern": pattern, "cache_states": states})


def _states(
    model: nn.Module, modules: str, own: Sequence[Sequence[_Call]], runs: Sequence[_Run]
) -> tuple[CacheState, ...]:
    """Return the states of a list, hidden states first."""
    calls, paths = own[0], [path for path in block_paths(model) if generalize(path) == modules]
    if modules.count(".") > 1:
        raise _Unfit("it is not a list of the module itself")
    if len(calls) < 2:
        raise _Unfit(f"{len(calls)} calls: nothing can be skipped between the first block and the end")
    if [call.path for call in calls] != paths:
        raise _Unfit("its blocks are not called once each, in order")
    effects = [effect for run in own for call in run for effect in call.effects]
    if effects:
        raise _Unfit(f"its blocks change their argument {effects[0]}")
    states: list[CacheState] = []
    for output in dict.fromkeys(path for call in calls for path in call.outputs):
        taken = {state.input for state in states}
        states.append(CacheState(input=_argument(calls, output, taken), output=output))
        _check_constant(calls, states[-1])
    grown = _growth([run.result for run in runs])
    hidden = [state for state in states if _grown(own, state.input) & grown]
    if states and not grown:
        hidden = states[:1]
    if not hidden:
        raise _Unfit("no tensor that its blocks return grows with the output")
    return (hidden[0], *(state for state in states if state is not hidden[0]))


def _argument(calls: Sequence[_Call], output: str, taken: set[str]) -> str:
    """Return the argument that is the previous block's result; one of its shape if there is none."""
    fits = [name for name in calls[0].inputs if name not in taken and _fits(calls, name, output)]
    links = {
        name: sum(_same(one, output, other, name) for one, other in zip(calls, calls[1:], strict=False))
        for name in fits
    }
    if not links:
        shape = next(tuple(call.outputs[output].shape) for call in calls if output in call.outputs)
        raise _Unfit(f"its blocks return a tensor {output or 'of shape'} {shape} that none of their arguments has")
    return max(links, key=lambda name: links[name])


def _check_constant(calls: Sequence[_Call], state: CacheState) -> None:
    """Refuse a list that receives a tensor of another size than the previous block returned."""
    for one, other in zip(calls, calls[1:], strict=False):
        given, returned = other.inputs[state.input].shape, one.inputs[state.input].shape
        if given != returned:
            raise _Unfit(
                f"{other.path} receives {state.input} of shape {tuple(given)}; the previous block returned "
                f"{tuple(returned)}"
            )


def _fits(calls: Sequence[_Call], name: str, output: str) -> bool:
    """Return True if an argument always has the shape of a result."""
    pairs = [(call.inputs.get(name), call.outputs[output]) for call in calls if output in call.outputs]
    return all(given is not None and given.shape == out.shape and given.dim() > 1 for given, out in pairs)


def _same(one: _Call, output: str, other: _Call, name: str) -> bool:
    left, right = one.outputs.get(output), other.inputs.get(name)
    return left is not None and right is not None and left.data_ptr() == right.data_ptr() and left.shape == right.shape


def _growth(shapes: Sequence[Any]) -> set[str]:
    """Return the modalities with more tokens that change a shape."""
    names = [name for name in RUNS if name != "batch"]
    return {name for name, shape in zip(names[1:], shapes[1:], strict=True) if shape != shapes[0]}


def _grown(own: Sequence[Sequence[_Call]], name: str) -> set[str]:
    return _growth([calls[0].inputs[name].shape for calls in own])


def _pattern(block: nn.Module, states: Sequence[CacheState], own: Sequence[Sequence[_Call]]) -> str:
    """Return the name of Cache-DiT's pattern; of more than two states, the first two count.

    Pattern 2 is that of blocks whose second argument has tokens of its own.
    """
    if len(states) > 1:
        outputs = list(dict.fromkeys(path for call in own[0] for path in call.outputs))
        return "Pattern_0" if outputs.index(states[0].output) < outputs.index(states[1].output) else "Pattern_1"
    second = list(inspect.signature(type(block).forward).parameters)[2:3]
    texts = [
        name for name in second if name in own[0][0].inputs and not _grown(own, name) <= _grown(own, states[0].input)
    ]
    return "Pattern_2" if texts else "Pattern_3"


def _alternating(proposed: Sequence[Blocks], calls: Sequence[_Call]) -> list[Blocks]:
    """Let lists follow the decision of a longer one with whose calls theirs alternate."""
    spans = {entry.modules: _span(entry.modules, calls) for entry in proposed if entry.cache_pattern}
    result = []
    for entry in proposed:
        own = spans.get(entry.modules)
        leader = next((name for name, span in spans.items() if own and _leads(span, own)), "")
        change = {"cache_pattern": "", "cache_with": leader} if leader else {}
        result.append(entry.model_copy(update=change))
    return result


def _span(modules: str, calls: Sequence[_Call]) -> tuple[int, int, int]:
    """Return the number of calls of a list, and the ordinals of the first and the last one."""
    ordinals = [ordinal for ordinal, call in enumerate(calls) if call.list == modules]
    return len(ordinals), ordinals[0], ordinals[-1]


def _leads(one: tuple[int, int, int], other: tuple[int, int, int]) -> bool:
    overlap = one[1] < other[2] and other[1] < one[2]
    return overlap and (one[0], one[2]) > (other[0], other[2])


def _tried(subject: Subject, proposed: Sequence[Blocks], calls: Sequence[_Call]) -> list[Blocks]:
    """Return the lists with the patterns that reuse what would be computed, alone and together."""
    fitting = [entry.modules for entry in proposed if entry.cache_pattern]
    findings = {name: _try(subject, proposed, {name}) for name in fitting}
    kept = {name for name in fitting if not findings[name]}
    if len(kept) > 1 and (together := _try(subject, proposed, kept)):
        longest = max(kept, key=lambda name: _span(name, calls))
        findings |= dict.fromkeys(kept - {longest}, f"not together with {longest}: {together}")
        kept = {longest}
    return [_without(entry, kept, findings) for entry in proposed]


def _without(entry: Blocks, kept: set[str], findings: dict[str, str] | None = None) -> Blocks:
    """Return a list without its pattern, unless it or the one that it follows is kept."""
    if not entry.cache_states or entry.modules in kept or entry.cache_with in kept:
        return entry
    reason = (findings or {}).get(entry.modules) or "the list that it alternates with is excluded"
    return entry.model_copy(update={"cache_pattern": "", "cache_states": (), "cache_with": "", "cache_reason": reason})


def _try(subject: Subject, proposed: Sequence[Blocks], kept: set[str]) -> str:
    """Return the finding if a cached step differs from a computed one, else an empty text."""
    from port_kit.autoparallel.cache.steps import check_reuse

    plan = Plan(subject=subject.name, module_class="", blocks=tuple(_without(entry, kept) for entry in proposed))
    return check_reuse(subject, plan, SCALE, TokenScale(image=1, text=1, audio=1))
