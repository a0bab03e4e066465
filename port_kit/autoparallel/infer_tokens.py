"""Inference of the sequence-parallel part of a plan: propose from shapes, try, amend."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from port_kit.autoparallel.observe import Observation, observe
from port_kit.autoparallel.plan import Plan, generalize
from port_kit.autoparallel.propose import Choice, Proposal, has_grid, orders_of_streams, output_modalities, propose
from port_kit.autoparallel.simulate import Trace, Trial, run_once, run_trial
from port_kit.autoparallel.streams import BATCH, RUNS, Observed
from port_kit.autoparallel.subject import ModelScale, Subject, TokenScale
from port_kit.errors import ParallelError

logger = logging.getLogger(__name__)

#: Inputs that a plan is tried with: masked and unmasked, with other numbers of tokens than were observed.
TRIALS = (TokenScale(image=1, masked=True), TokenScale(text=1, audio=1, batch=1))
#: Modules whose outputs depend on one token each, or that are containers.
_TOKENWISE = (nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.Dropout, nn.ModuleList, nn.Sequential)
#: Amendments of one choice.
_MAX_AMENDMENTS = 6


@dataclass
class TokenInference:
    """Result of the inference.

    Attributes:
        plan: plan with streams, boundaries and attention sites.
        trials: results at :data:`TRIALS`.
        reason: finding if there is no plan, else empty.
    """

    plan: Plan | None
    trials: list[Trial]
    reason: str = ""


def infer_tokens(subject: Subject, channels: Plan | None = None) -> TokenInference:
    """Infer the sequence-parallel part of a subject's plan.

    Args:
        subject: the subject.
        channels: plan with the channels that can be split, to exchange tokens and units at linears; None without.
    """
    model = subject.build(ModelScale())
    search = _Search(subject, model, observe_runs(subject, model), channels)
    return search.run()


def observe_runs(subject: Subject, model: nn.Module) -> Observed:
    """Observe a module at all :data:`~port_kit.autoparallel.streams.RUNS`.

    Raises:
        ParallelError: ``plan_inference``; runs make different calls.
    """
    runs = [observe(model, subject.inputs(replace(scale, masked=True))) for scale in RUNS.values()]
    if not _aligned(runs[0], runs[-1]):
        runs[-1] = runs[0]  # a larger batch is another number of calls
    for name, run in zip(RUNS, runs, strict=True):
        if not _aligned(runs[0], run):
            raise ParallelError(
                f"{subject.name}: with more {name} tokens the module calls other modules",
                code="plan_inference",
                hint="give inputs that take the same path at all sizes",
            )
    return Observed(tuple(runs))


def _aligned(one: Observation, other: Observation) -> bool:
    def calls(run: Observation) -> list[Any]:
        return [(c.path, [s.call for s in c.sites], [m.path for m in c.modules]) for c in run.calls]

    return calls(one) == calls(other)


class _Search:
    def __init__(self, subject: Subject, model: nn.Module, observed: Observed, channels: Plan | None = None) -> None:
        self.subject, self.model, self.channels = subject, model, channels
        self.regions = token_mixing_modules(channels) if channels is not None else ()
        self.observed = replace(observed, mixing=self.regions)
        self.inputs = [subject.inputs(scale) for scale in TRIALS]
        self.single: list[Trace] = [run_once(model, inputs) for inputs in self.inputs]
        self.tried: set[str] = set()
        self.reason = "no list of blocks with attention returns tokens of the output"
        if not observed.runs[0].calls:
            self.reason = "no block is called; code outside of the blocks calls their modules"

    def run(self) -> TokenInference:
        """Return the first choice that agrees; without one, the cheapest of all amended choices."""
        choices = list(self._choices())
        others = self._with_convolutions(choices), self._complete_arguments(choices), self._replicated(choices)
        for choice in itertools.chain(choices, *others):
            found = self._try(choice)
            if found is not None:
                return TokenInference(found[0].plan, found[1])
        amended = [found for choice in choices if (found := self._amended(choice)) is not None]
        if not amended:
            return TokenInference(None, [], self.reason)
        best = min(amended, key=lambda found: _cost(found[0]))
        return TokenInference(best[0].plan, best[1])

    def _choices(self) -> Iterator[Choice]:
        gathers, masks = ("end", "list", "block"), ("whole", "sharded")
        grids = (True, False) if has_grid(self.observed) else (False,)
        orders = range(orders_of_streams(self.observed))
        for grid, gather, order, mask in itertools.product(grids, gathers, orders, masks):
            yield Choice(gather=gather, order=order, masks=mask, grid=grid)  # type: ignore[arg-type]

    def _with_convolutions(self, choices: list[Choice]) -> Iterator[Choice]:
        """Exchange rows at all convolutions in blocks that keep the number of rows."""
        for choice in choices:
            proposal = self._propose(choice)
            if proposal is None:
                return
            amended = _with_halos(self.model, choice, proposal)
            if amended.halo:
                yield amended

    def _complete_arguments(self, choices: list[Choice]) -> Iterator[Choice]:
        """Leave one argument complete: a table that is indexed by position, for example."""
        for choice in choices:
            proposal = self._propose(choice)
            if proposal is None:
                return
            axes = [axis for blocks in proposal.plan.blocks for axis in blocks.inputs if axis.grid == 1]
            prefixes = dict.fromkeys(prefix for axis in axes for prefix in _prefixes(axis.path))
            yield from (replace(choice, complete=frozenset({prefix})) for prefix in prefixes)

    def _replicated(self, choices: list[Choice]) -> Iterator[Choice]:
        """Leave all tokens of one modality complete: text of which a mask selects some, for example."""
        others = set(RUNS) - output_modalities(self.observed) - {"", BATCH}
        for choice, modality in itertools.product(choices, sorted(others)):
            yield replace(choice, replicated=frozenset({modality}))

    def _try(self, choice: Choice, seen: list[tuple[Proposal, Trial]] | None = None) -> Any:
        proposal = self._propose(choice)
        if proposal is None:
            return None
        text = f"{seen is None} {proposal.plan.to_toml()}"
        if text in self.tried:
            return None
        self.tried.add(text)
        trials = []
        for inputs, single in zip(self.inputs, self.single, strict=True):
            trial = run_trial(self.model, inputs, proposal.plan, proposal.outputs, single)
            logger.info("%s -> %.1e %s %s", choice, trial.difference, trial.culprit, trial.error)
            trials.append(trial)
            if not trial.ok:
                self.reason = trial.error or f"first different module: {trial.culprit}"
                if seen is not None:
                    seen.append((proposal, trial))
                return None
        return proposal, trials

    def _propose(self, choice: Choice) -> Proposal | None:
        kind = type(self.model)
        proposal = propose(self.observed, choice, self.subject.name, f"{kind.__module__}.{kind.__qualname__}")
        if proposal is None or self.channels is None or not choice.linears:
            return proposal
        sections = {name: getattr(self.channels, name) for name in ("units", "linears", "norms", "tables", "divided")}
        return replace(proposal, plan=proposal.plan.model_copy(update=sections))

    def _amended(self, choice: Choice) -> Any:
        """Amend a choice until it agrees: exchange at linears, exchange rows, run modules on all tokens."""
        for _ in range(_MAX_AMENDMENTS):
            seen: list[tuple[Proposal, Trial]] = []
            found = self._try(choice, seen)
            if found is not None:
                return found
            amended = self._amend(choice, *seen[0]) if seen else None
            if amended is None:
                return None
            choice = amended
        return None

    def _amend(self, choice: Choice, proposal: Proposal, trial: Trial) -> Choice | None:
        region = next((one for one in self.regions if _is_below(generalize(trial.culprit), one)), None)
        if region is not None and region not in choice.linears and region not in choice.whole:
            better = self._at_linears(choice, region)
            if better is not None:
                return better
        return _amend(self.model, choice, proposal, trial)

    def _at_linears(self, choice: Choice, region: str) -> Choice | None:
        """Exchange at the linears of a module; leave arguments complete that it needs so, or gather them before it."""
        basic = replace(choice, linears=choice.linears | {region})
        gathering = replace(basic, gathered=basic.gathered | {region})
        for candidate in (basic, *self._complete_arguments([basic]), gathering):
            seen: list[tuple[Proposal, Trial]] = []
            if self._try(candidate, seen) or (seen and _is_beside(generalize(seen[0][1].culprit), region)):
                self.tried.clear()
                return candidate
        return None


def token_mixing_modules(channels: Plan) -> tuple[str, ...]:
    """Return the patterns of modules between whose linears tokens are mixed and channels are not."""
    found = []
    for unit in channels.units:
        inner = unit.name.removeprefix(unit.block.rpartition(".")[0]).lstrip(".")
        pattern = f"{unit.block}.{inner}"
        tables = any(_is_below(table.module, pattern) for table in channels.tables)
        if unit.mixes_tokens and inner and not tables:
            found.append(pattern)
    return tuple(found)


def _is_below(path: str, ancestor: str) -> bool:
    return f"{path}.".startswith(f"{ancestor}.")


def _is_beside(path: str, region: str) -> bool:
    """Return True if neither of two modules contains the other."""
    return not _is_below(path, region) and not _is_below(region, path)


def _prefixes(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts) + 1)]


def _cost(proposal: Proposal) -> tuple[int, int, int]:
    """Return the cost of a plan: lists left alone, modules on all tokens, halos."""
    choice = proposal.choice
    return len(choice.skip), len(choice.whole), len(choice.halo)


def _halo(module: nn.Module, proposal: Proposal) -> int:
    """Return the rows that a convolution reads on each side of a row; 0 if it is not one that keeps their number.

    Rows are those of a grid, or tokens for a convolution over one dimension.
    """
    if not isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) or isinstance(module.padding, str):
        return 0
    if not isinstance(module, nn.Conv1d) and not proposal.choice.grid:
        return 0
    reach = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
    keeps = all(stride == 1 for stride in module.stride) and reach[0] == 2 * module.padding[0]
    return reach[0] // 2 if keeps and module.padding_mode == "zeros" else 0


def _with_halos(model: nn.Module, choice: Choice, proposal: Proposal, kind: type[nn.Module] = nn.Module) -> Choice:
    """Exchange rows at all convolutions of a class within the blocks."""
    blocks = tuple(f"{blocks.modules}." for blocks in proposal.plan.blocks)
    found = {
        (generalize(path), _halo(module, proposal))
        for path, module in model.named_modules()
        if isinstance(module, kind) and generalize(path).startswith(blocks)
    }
    return replace(choice, halo=choice.halo | {(pattern, halo) for pattern, halo in found if halo})


def _amend(model: nn.Module, choice: Choice, proposal: Proposal, trial: Trial) -> Choice | None:
    path = trial.culprit
    blocks = [blocks.modules for blocks in proposal.plan.blocks]
    halo = _halo(model.get_submodule(path), proposal)
    if halo and generalize(path) not in dict(choice.halo):
        return _with_halos(model, choice, proposal, type(model.get_submodule(path)))
    while path and (pattern := generalize(path)) not in blocks:
        block = next((b for b in blocks if pattern.startswith(f"{b}.")), None)
        if block is None:
            break
        if pattern not in choice.whole and not isinstance(model.get_submodule(path), _TOKENWISE):
            inner = frozenset(one for one in choice.whole if not one.startswith(f"{pattern}."))
            return replace(choice, whole=inner | {pattern})
        path = path.rpartition(".")[0]
    pattern = generalize(trial.culprit)
    group = next((b for b in blocks if pattern == b or pattern.startswith(f"{b}.")), None)
    if group is None or len(blocks) == 1:
        return None
    return replace(choice, skip=choice.skip | {group.rpartition(".")[0]})
