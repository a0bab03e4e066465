"""Checks of a parallel run against a run on one rank: how work was divided, and where outputs diverge."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from port_kit.parallel.layout import Layout

if TYPE_CHECKING:
    from torch import Tensor

    from port_kit.parallel.recorder import AttentionCall, Trace

#: Fault codes, each with a hint.
FAULTS: Mapping[str, str] = {
    "not_sharded": "use the exact module paths of the boundaries in _sp_plan; an unknown path is only a warning",
    "not_cut": "shard this stream at its boundary in _sp_plan, or make the port's tiny request longer",
    "padding_attended": "pass the unpadded length to the attention (PaddedAttention, kv_length=padded_length(n))",
    "replicated_keys_exchanged": "pass skip_sequence_parallel=True to this attention: its keys are replicated",
    "weights_not_split": "use vLLM's parallel linears with full widths",
    "weights_not_sharded": "make _hsdp_shard_conditions match the blocks",
    "branches_not_divided": "call the branches through CFGParallelMixin",
    "wrong_branch": "run branch i on rank i % n of the guidance group",
    "outputs_differ": "check the first module that differs",
    "failed": "the traceback of the rank follows",
}
#: Largest ratio of a rank's parameter bytes under HSDP to an even share.
HSDP_SLACK = 1.1
#: Largest relative difference between fingerprints of equal inputs.
SAME_INPUT = 1e-3


@dataclass(frozen=True)
class Finding:
    """One fault in a parallel run.

    Attributes:
        fault: a key of :data:`FAULTS`.
        where: module path or rank.
        message: found and expected values.
        traceback: of the rank, if it failed.
    """

    fault: str
    where: str
    message: str
    traceback: str = ""

    @property
    def hint(self) -> str:
        """Remedy for the fault."""
        return FAULTS[self.fault]


def compare(layout: Layout, single: Trace, ranks: Sequence[Trace]) -> list[Finding]:
    """Return faults in the division of work. Outputs are compared by ``verify_layout``."""
    found: dict[tuple[str, str], Finding] = {}
    for index, trace in enumerate(ranks):
        for finding in _rank_findings(layout, single, trace, f"rank {index}"):
            found.setdefault((finding.fault, finding.where), finding)
    return list(found.values())


def _rank_findings(layout: Layout, single: Trace, trace: Trace, rank: str) -> Iterator[Finding]:
    if layout.sequence > 1:
        yield from _sequence(layout, single, trace)
        yield from _streams(layout, single, trace)
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
            f"{layout}: expected attention over a part of the sequence, got all tokens on each rank",
        )


def _streams(layout: Layout, single: Trace, trace: Trace) -> Iterator[Finding]:
    """Report each tensor of a boundary of which one rank had all tokens in every call."""
    for path, calls in trace.boundaries.items():
        same = {call.branch: call.tokens for call in single.boundaries.get(path, ())}
        whole: dict[int, tuple[int, int]] = {}
        cut = set()
        for call in calls:
            alone = same.get(branch_alone(layout, single, trace, call.branch), ())
            for index, (local, length) in enumerate(zip(call.tokens, alone, strict=False)):
                if local < length:
                    cut.add(index)
                elif length:
                    whole[index] = max(whole.get(index, (0, 0)), (length, local))
        for index in sorted(whole.keys() - cut):
            length, local = whole[index]
            yield Finding(
                "not_cut",
                path if len(calls[0].tokens) == 1 else f"{path}, tensor {index}",
                f"expected a rank boundary within the tokens of this stream, got {local} on each rank of {layout} for "
                f"{length} in all; equal results prove nothing",
            )


def branch_alone(layout: Layout, single: Trace, trace: Trace, branch: int) -> int:
    """Return the index on one rank of a rank's transformer call. Guidance ranks run branches round-robin."""
    if trace.calls * layout.cfg != single.calls:
        return branch
    return branch * layout.cfg + trace.rank_coords["cfg"]


def _attention(layout: Layout, path: str, call: AttentionCall, alone: AttentionCall) -> Finding | None:
    if not call.exchanged:
        return None
    if call.query >= alone.query > 1:
        return Finding(
            "not_sharded", path, f"expected a part of the {alone.query} query tokens per rank of {layout}, got all"
        )
    if call.key == alone.key and call.query < alone.query and alone.key > 1 and call.seen != alone.seen:
        return Finding(
            "replicated_keys_exchanged",
            path,
            f"keys are replicated but exchanged: expected {alone.seen} keys in the kernel, got {call.seen}",
        )
    if call.seen > alone.seen:
        return Finding("padding_attended", path, f"expected {alone.seen} keys in the kernel, got {call.seen}")
    return None


def _tensor(layout: Layout, single: Trace, trace: Trace) -> Iterator[Finding]:
    split = [path for path, (shape, _) in trace.parameters.items() if shape != single.parameters[path][0]]
    if not split:
        yield Finding(
            "weights_not_split",
            "transformer",
            f"expected split parameters, got full parameters on each rank of {layout}",
        )


def _hsdp(layout: Layout, single: Trace, trace: Trace, rank: str) -> Iterator[Finding]:
    share = trace.parameter_bytes / single.parameter_bytes
    if share > HSDP_SLACK / layout.hsdp:
        yield Finding(
            "weights_not_sharded",
            rank,
            f"expected at most {HSDP_SLACK / layout.hsdp:.0%} of the transformer's parameters with hsdp {layout.hsdp}, "
            f"got {share:.0%}",
        )


def _guidance(layout: Layout, single: Trace, trace: Trace, rank: str) -> Iterator[Finding]:
    place = trace.rank_coords["cfg"]
    if trace.calls >= single.calls > 1:
        yield Finding(
            "branches_not_divided",
            rank,
            f"expected fewer transformer calls than the {single.calls} of one rank, got {trace.calls}",
        )
    elif place < len(single.branches) and trace.branches and not _same(trace.branches[0], single.branches[place]):
        ran = [i for i, branch in enumerate(single.branches) if _same(trace.branches[0], branch)]
        what = f"branch {ran[0]}" if ran else "inputs that no branch has"
        yield Finding("wrong_branch", rank, f"expected branch {place} first, got {what}")


def _same(a: Sequence[float], b: Sequence[float]) -> bool:
    return len(a) == len(b) and all(
        abs(x - y) <= SAME_INPUT * (abs(x) + abs(y)) + 1e-9 for x, y in zip(a, b, strict=True)
    )


def first_divergence(single: Trace, trace: Trace, tolerance: float) -> str:
    """Return the path of the first module whose output differs from one rank's; empty if there is none.

    Both traces must hold outputs. Fused projections are skipped, because their shards interleave; the modules that
    use their outputs are compared.
    """
    expected: dict[tuple[str, int], list[Tensor]] = {}
    for path, call, value in single.outputs:
        expected.setdefault((path, call), []).append(value)
    for path, call, value in trace.outputs:
        queue = expected.get((path, call))
        if not queue:
            continue
        part = _local_part(queue.pop(0), value, trace.rank_coords)
        if part is not None and _distance(part, value) > tolerance:
            return path
    return ""


def _local_part(full_output: Tensor, local: Tensor, rank_coords: Mapping[str, int]) -> Tensor | None:
    """Slice a full output to a rank's part: dimension 1 by sequence rank, later ones by tensor-parallel rank."""
    if full_output.ndim != local.ndim:
        return None
    for dim, (full, own) in enumerate(zip(full_output.shape, local.shape, strict=True)):
        if full == own:
            continue
        place = rank_coords["sequence"] if dim == 1 else rank_coords["tp"]
        start = place * own
        if own > full or (dim > 1 and full % own):
            return None
        full_output = full_output.narrow(dim, min(start, full), max(0, min(own, full - start)))
    return full_output


def _distance(part: Tensor, local: Tensor) -> float:
    """Return the largest difference over the rows of ``part``; further rows of ``local`` are padding."""
    for dim, size in enumerate(part.shape):
        local = local.narrow(dim, 0, min(size, local.shape[dim]))
    difference = (part - local).abs()
    return torch.nan_to_num(difference, nan=float("inf")).max().item() if difference.numel() else 0.0
