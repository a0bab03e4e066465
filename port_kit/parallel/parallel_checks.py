"""What is wrong with a parallel run, told from what its ranks did beside what one rank did."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from port_kit.parallel.layout import Layout

if TYPE_CHECKING:
    from torch import Tensor

    from port_kit.parallel.recorder import AttentionCall, Trace

#: Faults that are told apart, and what to do about each.
FAULTS: Mapping[str, str] = {
    "not_sharded": "name the boundaries in _sp_plan exactly as the modules are called; a wrong name is only a warning",
    "padding_attended": "tell the attention the true length (PaddedAttention, kv_length=padded_length(n))",
    "replicated_keys_exchanged": "build this attention with skip_sequence_parallel=True: every rank has all its keys",
    "weights_not_split": "use vLLM's parallel linears and give each its full width",
    "weights_not_sharded": "let _hsdp_shard_conditions match the blocks",
    "branches_not_divided": "run the branches through CFGParallelMixin",
    "wrong_branch": "branch i belongs to rank i % n; use the rank of the guidance group",
    "outputs_differ": "look at the first module that differs",
    "failed": "read the rank's traceback",
}
#: HSDP keeps no more than this times its fair share of the parameters on a rank.
HSDP_SLACK = 1.1
#: Relative difference between fingerprints of the same inputs on one rank and on several.
SAME_INPUT = 1e-3


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        fault: a key of :data:`FAULTS`.
        where: the module, or the rank.
        message: what was seen and what was expected.
    """

    fault: str
    where: str
    message: str

    @property
    def hint(self) -> str:
        """What to do about it."""
        return FAULTS[self.fault]


def compare(layout: Layout, single: Trace, ranks: Sequence[Trace]) -> list[Finding]:
    """Return what is wrong with how the work was divided; results are compared elsewhere."""
    found: dict[tuple[str, str], Finding] = {}
    for index, trace in enumerate(ranks):
        for finding in _rank_findings(layout, single, trace, f"rank {index}"):
            found.setdefault((finding.fault, finding.where), finding)
    return list(found.values())


def _rank_findings(layout: Layout, single: Trace, trace: Trace, rank: str) -> Iterator[Finding]:
    if layout.sequence > 1:
        yield from _sequence(layout, single, trace)
    if layout.tp > 1:
        yield from _tensor(layout, single, trace)
    if layout.hsdp > 1:
        yield from _hsdp(layout, single, trace, rank)
    if layout.cfg > 1:
        yield from _guidance(layout, single, trace, rank)


def _sequence(layout: Layout, single: Trace, trace: Trace) -> Iterator[Finding]:
    any_sharded = False
    for path, calls in trace.attention.items():
        same = {call.branch: call for call in single.attention.get(path, ())}
        for call in calls:
            alone = same.get(branch_alone(layout, single, trace, call.branch))
            if alone is None:
                continue
            any_sharded |= call.query < alone.query
            finding = _attention(layout, path, call, alone)
            if finding:
                yield finding
                break
    if not any_sharded:
        yield Finding(
            "not_sharded",
            "transformer",
            f"{layout} is configured and no attention of any rank holds less than the whole sequence",
        )


def branch_alone(layout: Layout, single: Trace, trace: Trace, branch: int) -> int:
    """Return which call of the transformer on one rank a rank's call ``branch`` is: guidance ranks take turns."""
    if trace.calls * layout.cfg != single.calls:
        return branch
    return branch * layout.cfg + trace.rank_coords["cfg"]


def _attention(layout: Layout, path: str, call: AttentionCall, alone: AttentionCall) -> Finding | None:
    if not call.exchanged:
        return None
    if call.query >= alone.query > 1:
        return Finding(
            "not_sharded", path, f"its query has all {alone.query} tokens on every rank of {layout}, not a share"
        )
    if call.key == alone.key and call.query < alone.query and alone.key > 1 and call.seen != alone.seen:
        return Finding(
            "replicated_keys_exchanged",
            path,
            f"each rank has all {alone.key} keys, and they are exchanged: the kernel saw {call.seen}",
        )
    if call.seen > alone.seen:
        return Finding(
            "padding_attended", path, f"its kernel saw {call.seen} keys where one rank attends to {alone.seen}"
        )
    return None


def _tensor(layout: Layout, single: Trace, trace: Trace) -> Iterator[Finding]:
    split = [path for path, (shape, _) in trace.parameters.items() if shape != single.parameters[path][0]]
    if not split:
        yield Finding("weights_not_split", "transformer", f"every parameter is whole on every rank of {layout}")


def _hsdp(layout: Layout, single: Trace, trace: Trace, rank: str) -> Iterator[Finding]:
    share = trace.parameter_bytes / single.parameter_bytes
    if share > HSDP_SLACK / layout.hsdp:
        yield Finding(
            "weights_not_sharded",
            rank,
            f"it holds {share:.0%} of the transformer's parameters; hsdp {layout.hsdp} allows "
            f"{HSDP_SLACK / layout.hsdp:.0%}",
        )


def _guidance(layout: Layout, single: Trace, trace: Trace, rank: str) -> Iterator[Finding]:
    place = trace.rank_coords["cfg"]
    if trace.calls >= single.calls > 1:
        yield Finding(
            "branches_not_divided",
            rank,
            f"it ran the transformer {trace.calls} times, as often as one rank alone",
        )
    elif place < len(single.branches) and trace.branches and not _same(trace.branches[0], single.branches[place]):
        ran = [i for i, branch in enumerate(single.branches) if _same(trace.branches[0], branch)]
        what = f"branch {ran[0]}" if ran else "inputs that one rank never ran"
        yield Finding("wrong_branch", rank, f"it is number {place} of its guidance group and began with {what}")


def _same(a: Sequence[float], b: Sequence[float]) -> bool:
    return len(a) == len(b) and all(
        abs(x - y) <= SAME_INPUT * (abs(x) + abs(y)) + 1e-9 for x, y in zip(a, b, strict=True)
    )


def first_divergence(single: Trace, trace: Trace, tolerance: float) -> str:
    """Name the first module whose output is not this rank's part of one rank's; empty if there is none.

    Both traces must hold outputs. Layers whose parts interleave (fused projections) cannot be compared and are passed
    over; what they feed is compared.
    """
    expected: dict[tuple[str, int], list[Tensor]] = {}
    for path, call, value in single.outputs:
        expected.setdefault((path, call), []).append(value)
    for path, call, value in trace.outputs:
        queue = expected.get((path, call))
        if not queue:
            continue
        part = _own_part(queue.pop(0), value, trace.rank_coords)
        if part is not None and _distance(part, value) > tolerance:
            return path
    return ""


def _own_part(whole: Tensor, local: Tensor, rank_coords: Mapping[str, int]) -> Tensor | None:
    """Cut the whole output down to a rank's: dimension 1 by its place in the sequence, later ones by tensor place."""
    if whole.ndim != local.ndim:
        return None
    for dim, (full, own) in enumerate(zip(whole.shape, local.shape, strict=True)):
        if full == own:
            continue
        place = rank_coords["sequence"] if dim == 1 else rank_coords["tp"]
        start = place * own
        if own > full or (dim > 1 and full % own):
            return None
        whole = whole.narrow(dim, min(start, full), max(0, min(own, full - start)))
    return whole


def _distance(part: Tensor, local: Tensor) -> float:
    """Largest difference over the rows that exist on one rank; the rest of ``local`` is padding."""
    for dim, size in enumerate(part.shape):
        local = local.narrow(dim, 0, min(size, local.shape[dim]))
    difference = (part - local).abs()
    return torch.nan_to_num(difference, nan=float("inf")).max().item() if difference.numel() else 0.0
