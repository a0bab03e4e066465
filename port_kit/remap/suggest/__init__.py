"""Propose a rule set from two manifests alone: names and shapes, nothing else.

The modules of both sides are matched as templates over layers (:mod:`.module_groups`), with fused projections and stacks of
experts as further candidates (:mod:`.virtual_groups`), by what their names mean (:mod:`.vocabulary`), by the sizes of the
modules around them, by their neighbours and by their order (:mod:`.scores`). The assignment is global (:mod:`.assignment`).
Each pair becomes rules (:mod:`.rule_writer`) and gets a verdict (:mod:`.classify`): ``certain`` only where nothing else is
possible, ``likely`` with the doubts in words. What nothing speaks for is left out and listed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from port_kit.remap.plan import check
from port_kit.remap.plan_json import plan_map
from port_kit.remap.rules import RuleSet
from port_kit.remap.suggest.alignment import drop_unit_dims
from port_kit.remap.suggest.classify import GUESS, LIKELY, Judge
from port_kit.remap.suggest.conventions import apply_conventions
from port_kit.remap.suggest.match import Match
from port_kit.remap.suggest.match_entries import Entry, entries_of
from port_kit.remap.suggest.module_groups import Shape
from port_kit.remap.suggest.rule_writer import drop_rules, rules_of
from port_kit.remap.suggest.search import match
from port_kit.remap.suggest.suggestion import Proposal, Suggestion
from port_kit.remap.suggest.vocabulary import words

if TYPE_CHECKING:
    from port_kit.manifest import Manifest

__all__ = ["Proposal", "Suggestion", "suggest"]

_VOCABULARY = ("token", "embed", "head", "out", "shared", "logits")  # one of these is in the name of such a table
_NO_USE = "nothing in the target has a place for it"


def suggest(source: Manifest, target: Manifest, name: str = "suggested") -> Suggestion:
    """Propose rules that map one manifest onto another.

    Args:
        source: names and shapes of the checkpoint.
        target: names and shapes of the module.
        name: name of the proposed rule set.

    Returns:
        The proposal; its rules compile wherever nothing is missing.
    """
    given, wanted = _shapes(source), _shapes(target)
    found, judge = _matches(_plain(given), _plain(wanted))
    proposals = _kept([_proposal(item, judge, given) for item in found], found, source, target)
    explained = {tensor for proposal in proposals for tensor in proposal.targets}
    used = {tensor for proposal in proposals for tensor in proposal.sources}
    unused = {tensor: shape for tensor, shape in given.items() if tensor not in used}
    missing = _missing({tensor: shape for tensor, shape in wanted.items() if tensor not in explained}, unused)
    if not missing:
        proposals += _drops(unused, used)
    narrow = {spec.dtype for spec in source.values()} != {spec.dtype for spec in target.values()}
    return Suggestion(name, tuple(proposals), missing, narrow, _tied(missing, explained, wanted))


def _plain(shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """The names without signs that mean something in templates: nothing is proposed for the others."""
    return {name: shape for name, shape in shapes.items() if not set(name) & set("\\{}")}


def _proposal(item: Match, judge: Judge, names: Mapping[str, Shape]) -> Proposal:
    verdict = judge.verdict(item)
    entries = dict(entries_of(item))
    sources = tuple(dict.fromkeys(origin for entry in entries.values() for origin in entry["from"]))
    rules = () if verdict.level == GUESS else tuple(rules_of(item, names))
    return Proposal(rules, verdict.level, f"{item.source} -> {item.target}", tuple(entries), sources, verdict.doubts)


def _kept(proposals: Sequence[Proposal], found: Sequence[Match], source: Manifest, target: Manifest) -> list[Proposal]:
    """The proposals that are more than a guess and whose rules, compiled, do what the match says."""
    rules = RuleSet("suggested", tuple(rule for proposal in proposals for rule in proposal.rules))
    compiled = plan_map(check(rules, source, target, allow_downcast=True))
    return [
        proposal
        for proposal, item in zip(proposals, found, strict=True)
        if proposal.rules and all(_same(compiled.get(name), entry) for name, entry in entries_of(item))
    ]


def _same(one: Entry | None, other: Entry) -> bool:
    """Whether two entries say the same; the parts of a computation have no order."""
    if one is None or other["op"] != "computed":
        return one == other
    return {**one, "from": sorted(one["from"])} == {**other, "from": sorted(other["from"])}


def _matches(source: Mapping[str, Shape], target: Mapping[str, Shape]) -> tuple[list[Match], Judge]:
    found = apply_conventions(match(source, target))
    return found, Judge(found)


def _shapes(manifest: Manifest) -> dict[str, Shape]:
    return {name: tuple(spec.shape) for name, spec in manifest.items()}


def _missing(targets: Mapping[str, Shape], unused: Mapping[str, Shape]) -> dict[str, tuple[str, ...]]:
    fitting: dict[Shape, list[str]] = defaultdict(list)
    for name, shape in unused.items():
        fitting[drop_unit_dims(shape)].append(name)
    return {name: tuple(fitting[drop_unit_dims(shape)]) for name, shape in targets.items()}


def _tied(
    missing: Mapping[str, tuple[str, ...]], explained: Collection[str], wanted: Mapping[str, Shape]
) -> dict[str, str]:
    """Missing tables of a vocabulary with the explained one that they may share: it is for the module to say.

    A rule that keeps what may be tied would leave a head uninitialised where it is not, so none is proposed.
    """
    tables = [tensor for tensor in explained if _is_vocabulary(tensor, wanted[tensor])]
    found: dict[str, str] = {}
    for tensor, fitting in missing.items():
        twin = min((table for table in tables if wanted[table] == wanted[tensor]), default=None)
        if twin is not None and not fitting and _is_vocabulary(tensor, wanted[tensor]):
            found[tensor] = twin
    return found


def _is_vocabulary(name: str, shape: Shape) -> bool:
    """Whether a tensor has a row a word and a name that an embedding or an output head has."""
    meant = {word for part in name.split(".") for word in words(part)}
    return (
        len(shape) == 2 and shape[0] > shape[1] and bool(meant & {"token", "embed", "head", "out", "shared", "logits"})
    )


def _drops(unused: Iterable[str], used: Collection[str]) -> list[Proposal]:
    """Rules for the sources that no target takes; likely, because a missing target would look the same."""
    return [
        Proposal((rule,), LIKELY, f"{rule.source} is dropped", (), tuple(names), ("every target is explained",))
        for rule, names in drop_rules(unused, used, _NO_USE)
    ]
