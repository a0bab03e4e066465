"""A plan as text for people."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from port_kit.autoparallel.plan import AttentionSite, Plan, TokenAxis
from port_kit.autoparallel.tokens import WHOLE


def describe(plan: Plan) -> str:
    """Return one section per kind of parallelism."""
    return "\n".join([f"{plan.subject} ({plan.module_class})", *_tokens(plan), *_channels(plan), *_rest(plan)])


def _tokens(plan: Plan) -> Iterator[str]:
    if plan.streams:
        yield "tokens"
    for stream in plan.streams:
        yield f"  stream {stream.name}, grows with {', '.join(stream.grows_with)}"
    for blocks in (each for each in plan.blocks if each.inputs or each.outputs):
        gathered = {"last": "gather after the last", "each": "gather after each", "never": "stay sharded"}
        yield f"  {blocks.modules}: shard {_axes(blocks.inputs)}; {gathered[blocks.gather]}"
    for site in plan.attention:
        if site.at == "linears":
            first = f"; {_axes(site.gathered)} is gathered first" if site.gathered else ""
            yield f"  {site.module}: tokens are exchanged for channels at {_before(site)}{first}"
            continue
        yield f"  {site.module}: attention of {'+'.join(site.queries)} to {_keys(site)}"
    for whole in plan.whole:
        rows = f"exchanges {whole.halo} rows with its neighbors" if whole.halo else "runs on all tokens on every rank"
        yield f"  {whole.module}: {rows}, {whole.reason}"


def _axes(axes: Iterable[TokenAxis]) -> str:
    return ", ".join(f"{axis.path} ({'+'.join(axis.streams)})" for axis in axes) or "nothing"


def _before(site: AttentionSite) -> str:
    return ", ".join(axis.path for axis in site.axes)


def _keys(site: AttentionSite) -> str:
    if all(stream == WHOLE for stream in site.keys):
        return "keys that are complete on every rank: no communication"
    mask = f", {site.mask} mask" if site.mask else ""
    return "+".join("complete keys" if stream == WHOLE else stream for stream in site.keys) + mask


def _channels(plan: Plan) -> Iterator[str]:
    sections: dict[str, tuple[Any, ...]] = {"norms": plan.norms, "tables": plan.tables, "divided": plan.divided}
    if plan.linears:
        yield "channels"
    for role in ("column", "row", "gathered"):
        named = [linear.module for linear in plan.linears if linear.role == role]
        if named:
            yield f"  {role}: {', '.join(named)}"
    for name, entries in sections.items():
        if entries:
            yield f"  {name}: {', '.join(dict.fromkeys(entry.module for entry in entries))}"


def _cache(plan: Plan) -> Iterator[str]:
    if any(blocks.cache_pattern for blocks in plan.blocks):
        yield "Cache-DiT"
    for blocks in plan.blocks:
        states = ", ".join(state.input for state in blocks.cache_states)
        if blocks.cache_pattern:
            yield f"  {blocks.modules}: {blocks.cache_pattern}, reuses {states}"
        elif blocks.cache_with:
            yield f"  {blocks.modules}: with {blocks.cache_with}"
        elif blocks.cache_reason:
            yield f"  {blocks.modules}: not reused, {blocks.cache_reason}"


def _rest(plan: Plan) -> Iterator[str]:
    units = [blocks.modules for blocks in plan.blocks if blocks.hsdp]
    if units:
        yield f"blocks for HSDP: {', '.join(units)}"
    complete = [pattern for blocks in plan.blocks for pattern in blocks.complete]
    if complete:
        yield f"  complete, called from outside of their block: {', '.join(complete)}"
    yield from _cache(plan)
    for refusal in plan.refused:
        yield f"refused {refusal.kind}: {refusal.reason}"
    for proof in plan.proofs:
        control = "" if proof.control is None else f", {proof.control:.0e} with one exchange left out"
        yield f"proven {proof.layout} ({proof.scale}, {proof.dtype}): difference {proof.difference:.1e}{control}"
