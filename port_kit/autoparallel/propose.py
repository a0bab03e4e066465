"""Sequence-parallel plans proposed from observations, under a choice of what shapes alone do not decide."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from port_kit.autoparallel.observe import BlockCall, SiteCall
from port_kit.autoparallel.plan import AttentionSite, Blocks, Plan, Stream, TokenAxis, WholeModule, generalize
from port_kit.autoparallel.streams import (
    BATCH,
    MAX_PARTS,
    Naming,
    Observed,
    Sizes,
    axes,
    basic_streams,
    grid_axes,
    growth,
    with_complete_parts,
)
from port_kit.autoparallel.tokens import WHOLE


@dataclass(frozen=True)
class Choice:
    """Choices that shapes do not determine.

    Attributes:
        gather: after the last block of all (``end``), of each list (``list``), or after every block (``block``).
        order: order of the streams in concatenations.
        masks: arguments that look like masks stay complete, or are sharded.
        skip: lists of blocks that are left alone.
        complete: arguments, or parts of them, that stay complete on every rank.
        replicated: modalities whose tokens are not sharded.
        whole: patterns of modules that run on all tokens.
        linears: patterns of modules that exchange tokens and units at their linears.
        gathered: those of them whose arguments are gathered first.
        grid: streams whose grid is among the arguments of blocks are sharded by rows.
        halo: patterns of convolutions that exchange rows at the edges of each rank's part.
    """

    gather: Literal["end", "list", "block"] = "end"
    order: int = 0
    masks: Literal["whole", "sharded"] = "whole"
    skip: frozenset[str] = frozenset()
    complete: frozenset[str] = frozenset()
    replicated: frozenset[str] = frozenset()
    whole: frozenset[str] = frozenset()
    linears: frozenset[str] = frozenset()
    gathered: frozenset[str] = frozenset()
    grid: bool = False
    halo: frozenset[tuple[str, int]] = frozenset()


@dataclass
class _Group:
    """A list of blocks: ordinals of its calls, and its streams."""

    ordinals: list[int] = field(default_factory=list)
    streams: set[Sizes] = field(default_factory=set)


@dataclass(frozen=True)
class Proposal:
    """A plan that is to be tried.

    Attributes:
        plan: the plan.
        choice: what it was made with.
        outputs: token axes of the outputs of all modules in blocks, by path and number of the call.
    """

    plan: Plan
    choice: Choice
    outputs: dict[tuple[str, int], tuple[TokenAxis, ...]]


def propose(observed: Observed, choice: Choice, subject: str, module_class: str) -> Proposal | None:
    """Return the plan for the lists of blocks that return tokens of the module's output, or None if there is none.

    Args:
        observed: runs of the module.
        choice: what shapes do not decide.
        subject: reference of the subject.
        module_class: qualified name of the class.
    """
    groups = _groups(observed, choice.skip, choice.replicated)
    if not groups:
        return None
    naming = Naming()
    calls = observed.runs[0].calls
    blocks, sites, whole = [], [], []
    last = max(max(group.ordinals) for group in groups.values())
    for group in groups.values():
        basic = basic_streams(group.streams)
        entries = [_block(observed, ordinal, basic, choice, naming) for ordinal in group.ordinals]
        inputs, outputs = _merge(entry[0] for entry in entries), _merge(entry[1] for entry in entries)
        gather = _gather(choice, group, last)
        modules = generalize(calls[group.ordinals[0]].path)
        blocks.append(Blocks(modules=modules, inputs=inputs, outputs=outputs, gather=gather))
        for ordinal in group.ordinals:
            sites += _sites(observed, ordinal, basic, choice, naming)
            sites += _linear_sites(observed, ordinal, basic, choice, naming)
            whole += _whole(observed, ordinal, basic, choice, naming)
    plan = Plan(
        subject=subject,
        module_class=module_class,
        streams=tuple(Stream(name=name, grows_with=growth(sizes)) for sizes, name in naming.names.items()),
        blocks=tuple(blocks),
        attention=tuple(dict.fromkeys(sites)),
        whole=tuple({one.module: one for one in whole}.values()),
    )
    return Proposal(plan, choice, _output_axes(observed, groups, choice, naming))


def _groups(
    observed: Observed, skip: frozenset[str] = frozenset(), replicated: frozenset[str] = frozenset()
) -> dict[str, _Group]:
    """Return the lists of blocks that mix tokens, and return tokens of the module's output."""
    output = output_modalities(observed)
    groups: dict[str, _Group] = {}
    for ordinal, call in enumerate(observed.runs[0].calls):
        returned = observed.sizes(_outputs(ordinal))
        streams = {s for (path, dim), s in returned.items() if dim >= 0 and _rank(call.outputs[path]) >= 2}
        mixes = bool(call.sites) or any(_is_below(one, generalize(call.path)) for one in observed.mixing)
        if call.group not in skip and mixes and any(set(growth(s)) & output for s in streams):
            group = groups.setdefault(call.group, _Group())
            group.ordinals.append(ordinal)
            group.streams |= {sizes for sizes in streams if not set(growth(sizes)) <= replicated}
    return groups


def output_modalities(observed: Observed) -> set[str]:
    """Return the modalities with which the module's output grows."""
    return {name for s in observed.sizes(lambda run: run.outputs).values() for name in growth(s)} - {BATCH}


def _rank(shape: Any) -> int:
    return len(shape) if isinstance(shape, tuple) else 0


def _gather(choice: Choice, group: _Group, last: int) -> Literal["last", "each", "never"]:
    contiguous = group.ordinals[-1] - group.ordinals[0] + 1 == len(group.ordinals)
    if choice.gather == "end":
        return "last" if last in group.ordinals else "never"
    return "last" if choice.gather == "list" and contiguous else "each"


def _inputs(ordinal: int) -> Any:
    return lambda run: run.calls[ordinal].inputs


def _outputs(ordinal: int) -> Any:
    return lambda run: run.calls[ordinal].outputs


def _module_inputs(ordinal: int, number: int) -> Any:
    return lambda run: run.calls[ordinal].modules[number].inputs


def _module_outputs(ordinal: int, number: int) -> Any:
    return lambda run: run.calls[ordinal].modules[number].outputs


def _block(
    observed: Observed, ordinal: int, basic: list[Sizes], choice: Choice, naming: Naming
) -> tuple[tuple[TokenAxis, ...], tuple[TokenAxis, ...]]:
    """Return the axes of a block's arguments and outputs."""
    given = observed.sizes(_inputs(ordinal))
    _split_by_counts(observed.runs[0].calls[ordinal], given, basic)
    found = axes(given, basic, choice.order, naming)
    if choice.masks == "whole":
        inputs = observed.runs[0].calls[ordinal].inputs
        found = tuple(a for a in found if a.dim < 0 or not _is_mask(inputs[a.path], a.path, given))
    if choice.grid:
        found = _with_grid(found, observed.all_sizes(_inputs(ordinal)), basic, naming)
    found = tuple(axis for axis in found if not _below(axis.path, choice.complete))
    return found, axes(observed.sizes(_outputs(ordinal)), basic, choice.order, naming)


def _below(path: str, prefixes: frozenset[str]) -> bool:
    return any(path == prefix or path.startswith(f"{prefix}.") for prefix in prefixes)


def _with_grid(
    found: tuple[TokenAxis, ...], sizes: dict[tuple[str, int], Sizes], basic: list[Sizes], naming: Naming
) -> tuple[TokenAxis, ...]:
    known = {axis.path for axis in found}
    return found + tuple(axis for axis in grid_axes(sizes, basic, naming) if axis.path not in known)


def has_grid(observed: Observed) -> bool:
    """Return True if integer arguments of a block hold the grid of a stream."""
    for group in _groups(observed).values():
        for ordinal in group.ordinals:
            found = grid_axes(observed.all_sizes(_inputs(ordinal)), basic_streams(group.streams), Naming())
            if any(axis.dim < 0 for axis in found):
                return True
    return False


def orders_of_streams(observed: Observed) -> int:
    """Return the number of orders in which the streams of one block can be concatenated."""
    most = max((len(basic_streams(group.streams)) for group in _groups(observed).values()), default=1)
    return math.factorial(min(max(most, 2), MAX_PARTS))


def _split_by_counts(call: BlockCall, given: dict[tuple[str, int], Sizes], basic: list[Sizes]) -> None:
    """Split a stream in two if an integer argument counts the tokens of its first part."""
    for (_, dim), sizes in given.items():
        if dim >= 0 or sizes in basic:
            continue
        for stream in list(basic):
            rest = tuple(a - b for a, b in zip(stream, sizes, strict=True))
            if all(value > 0 for value in rest) and len(set(rest)) > 1 and not set(growth(rest)) & set(growth(sizes)):
                basic.remove(stream)
                basic += [part for part in (sizes, rest) if part not in basic]
                break


def _is_mask(shape: Any, path: str, given: dict[tuple[str, int], Sizes]) -> bool:
    """Return True if a value has no dimension of features: all are tokens, the batch, or 1."""
    tokens = {dim for (one, dim) in given if one == path}
    batch = shape[0]
    return all(dim in tokens or dim == 0 or size in (1, batch) for dim, size in enumerate(shape))


def _merge(found: Iterable[Sequence[TokenAxis]]) -> tuple[TokenAxis, ...]:
    return tuple({axis.path: axis for some in found for axis in some}.values())


def _sites(observed: Observed, ordinal: int, basic: list[Sizes], choice: Choice, naming: Naming) -> list[AttentionSite]:
    counts: dict[tuple[str, tuple[str, ...]], int] = {}
    result = []
    for number, site in enumerate(observed.runs[0].calls[ordinal].sites):
        if any(_is_below(generalize(site.module), pattern) for pattern in choice.linears):
            continue
        key = generalize(site.module), site.call
        index = counts.get((site.module, site.call), 0)
        counts[site.module, site.call] = index + 1
        every = [run.calls[ordinal].sites[number] for run in observed.runs]
        queries = _parts([one.query[-2] for one in every], basic, choice, naming)
        keys = _parts([one.key[-2] for one in every], basic, choice, naming)
        mask = _mask(site, keys, choice)
        result.append(AttentionSite(module=key[0], call=key[1], index=index, queries=queries, keys=keys, mask=mask))
    return result


def _is_below(path: str, ancestor: str) -> bool:
    return f"{path}.".startswith(f"{ancestor}.")


def _linear_sites(
    observed: Observed, ordinal: int, basic: list[Sizes], choice: Choice, naming: Naming
) -> list[AttentionSite]:
    """Return the sites at linears of a block, with the token axes of all modules inside of them."""
    found: dict[str, dict[str, TokenAxis]] = {}
    gathered: dict[str, tuple[TokenAxis, ...]] = {}
    for number, call in enumerate(observed.runs[0].calls[ordinal].modules):
        pattern = generalize(call.path)
        if pattern in choice.gathered:
            sizes = observed.sizes(_module_inputs(ordinal, number))
            gathered[pattern] = axes(sizes, basic, choice.order, naming)
        owner = next((one for one in choice.linears if _is_below(pattern, one) and pattern != one), None)
        if owner is not None and "input" in call.inputs:
            kinds = (_module_inputs(ordinal, number), _module_outputs(ordinal, number))
            (given, returned) = (axes(observed.sizes(pick), basic, choice.order, naming) for pick in kinds)
            if given and returned and given[0].streams == returned[0].streams:
                path = pattern.removeprefix(f"{owner}.")
                axis = TokenAxis(path=path, dim=returned[0].dim, streams=returned[0].streams)
                found.setdefault(owner, {})[path] = axis
    return [
        AttentionSite(module=owner, at="linears", axes=tuple(each.values()), gathered=gathered.get(owner, ()))
        for owner, each in found.items()
    ]


def _mask(site: SiteCall, keys: tuple[str, ...], choice: Choice) -> Literal["", "whole", "sharded"]:
    if site.mask is None or all(stream == WHOLE for stream in keys):
        return ""
    return choice.masks


def _parts(lengths: list[int], basic: list[Sizes], choice: Choice, naming: Naming) -> tuple[str, ...]:
    parts = with_complete_parts(tuple(lengths), basic, choice.order) if len(set(lengths)) > 1 else (None,)
    return tuple(WHOLE if part is None else naming.name(part) for part in parts)


def _whole(observed: Observed, ordinal: int, basic: list[Sizes], choice: Choice, naming: Naming) -> list[WholeModule]:
    result = []
    halos = dict(choice.halo)
    for number, call in enumerate(observed.runs[0].calls[ordinal].modules):
        pattern = generalize(call.path)
        if pattern not in choice.whole and pattern not in halos:
            continue
        inputs = _module_axes(observed, _module_inputs(ordinal, number), basic, choice, naming)
        outputs = _module_axes(observed, _module_outputs(ordinal, number), basic, choice, naming)
        halo = halos.get(pattern, 0)
        if halo and not inputs:
            continue  # it processes no tokens that are sharded
        reason = "a convolution over rows" if halo else "its outputs depend on other tokens"
        result.append(WholeModule(module=pattern, inputs=inputs, outputs=outputs, halo=halo, reason=reason))
    return result


def _module_axes(
    observed: Observed, pick: Any, basic: list[Sizes], choice: Choice, naming: Naming
) -> tuple[TokenAxis, ...]:
    found = axes(observed.sizes(pick), basic, choice.order, naming)
    return _with_grid(found, observed.all_sizes(pick), basic, naming) if choice.grid else found


def _output_axes(
    observed: Observed, groups: dict[str, _Group], choice: Choice, naming: Naming
) -> dict[tuple[str, int], tuple[TokenAxis, ...]]:
    counts: dict[str, int] = {}
    result: dict[tuple[str, int], tuple[TokenAxis, ...]] = {}
    for ordinal, call in enumerate(observed.runs[0].calls):
        basic = basic_streams(groups[call.group].streams) if call.group in groups else []
        _split_by_counts(call, observed.sizes(_inputs(ordinal)), basic)
        for number, inner in enumerate(call.modules):
            nth = counts.get(inner.path, 0)
            counts[inner.path] = nth + 1
            result[inner.path, nth] = _module_axes(observed, _module_outputs(ordinal, number), basic, choice, naming)
    return result
