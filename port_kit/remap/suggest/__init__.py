"""Propose a rule set from two manifests alone: names, shapes and dtypes.

Modules of both sides are grouped over layers (:mod:`.module_groups`); fused projections and stacks of experts are
further candidates (:mod:`.virtual_groups`). Pairs are scored by the meaning of their names (:mod:`.vocabulary`), the
sizes of the modules around them, their neighbors and their order (:mod:`.scores`), and assigned globally
(:mod:`.assignment`). Dtypes decide which copies are possible (:mod:`.number_kinds`). Each pair becomes rules
(:mod:`.rule_writer`) of a confidence that :mod:`.classify` defines. Matches without evidence are left out and listed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from port_kit.remap.plan import check
from port_kit.remap.rules import RuleSet
from port_kit.remap.suggest.alignment import drop_unit_dims
from port_kit.remap.suggest.classify import LIKELY, REJECTED, Classifier
from port_kit.remap.suggest.conventions import apply_conventions
from port_kit.remap.suggest.match import Match
from port_kit.remap.suggest.module_groups import Shape
from port_kit.remap.suggest.number_kinds import possible_scales
from port_kit.remap.suggest.rule_writer import drop_rules, rules_of
from port_kit.remap.suggest.search import match
from port_kit.remap.suggest.suggestion import Proposal, Suggestion
from port_kit.remap.suggest.vocabulary import words

if TYPE_CHECKING:
    from port_kit.manifest import Manifest, TensorSpec

__all__ = ["Proposal", "Suggestion", "suggest"]

_TABLE_WORDS = {"token", "embed", "head", "out", "shared", "logits"}
_DROP_REASON = "nothing in the target has a place for it"


def suggest(source: Manifest, target: Manifest, name: str = "suggested") -> Suggestion:
    """Propose rules that map one manifest onto another.

    Args:
        source: names, shapes and dtypes of the checkpoint.
        target: names, shapes and dtypes of the module.
        name: name of the proposed rule set.

    Returns:
        The proposal; its rules compile if no target is missing.
    """
    given, wanted = _without_template_signs(source), _without_template_signs(target)
    found = apply_conventions(match(given, wanted))
    classifier = Classifier(found, given, wanted)
    proposals = _verified([_proposal(item, classifier, source) for item in found], found, source, target)
    explained = {tensor for proposal in proposals for tensor in proposal.targets}
    used = {tensor for proposal in proposals for tensor in proposal.sources}
    unused = [tensor for tensor in source if tensor not in used]
    fitting: dict[Shape, list[str]] = defaultdict(list)
    for tensor in unused:
        fitting[drop_unit_dims(source[tensor].shape)].append(tensor)
    missing = {
        tensor: tuple(fitting[drop_unit_dims(spec.shape)]) for tensor, spec in target.items() if tensor not in explained
    }
    scales = possible_scales(unused, used, {spec.dtype for spec in source.values()})
    if not missing:
        proposals += _drops([tensor for tensor in unused if tensor not in scales], used)
    allow_downcast = {spec.dtype for spec in source.values()} != {spec.dtype for spec in target.values()}
    return Suggestion(name, tuple(proposals), missing, allow_downcast, _tied(missing, explained, target), tuple(scales))


def _without_template_signs(manifest: Manifest) -> dict[str, TensorSpec]:
    """Leave out names with special characters of templates: no rule is proposed for them."""
    return {name: spec for name, spec in manifest.items() if not set(name) & set("\\{}")}


def _proposal(item: Match, classifier: Classifier, names: Collection[str]) -> Proposal:
    confidence, doubts = classifier.classify(item)
    links = item.links()
    sources = tuple(dict.fromkeys(origin for origins in links.values() for origin in origins))
    rules = () if confidence == REJECTED else tuple(rules_of(item, names))
    return Proposal(rules, confidence, f"{item.source} -> {item.target}", tuple(links), sources, doubts)


def _verified(
    proposals: Sequence[Proposal], found: Sequence[Match], source: Manifest, target: Manifest
) -> list[Proposal]:
    """Return the proposals that are not rejected and whose rules, compiled, agree with the match."""
    rules = RuleSet("suggested", tuple(rule for proposal in proposals for rule in proposal.rules))
    plan = check(rules, source, target, allow_downcast=True)
    compiled = {name: {task.source for task in tasks} for name, tasks in plan.by_target().items()}
    return [
        proposal
        for proposal, item in zip(proposals, found, strict=True)
        if proposal.rules and all(compiled.get(name) == set(origins) for name, origins in item.links().items())
    ]


def _tied(missing: Mapping[str, tuple[str, ...]], explained: Collection[str], target: Manifest) -> dict[str, str]:
    """Missing token tables with the explained one that they may share.

    A rule that keeps them would leave the head of a module that does not tie them uninitialized, so none is proposed.
    """
    tables = {
        target[tensor].shape: tensor for tensor in sorted(explained, reverse=True) if _is_token_table(tensor, target)
    }
    heads = (tensor for tensor, fitting in missing.items() if not fitting and _is_token_table(tensor, target))
    return {tensor: tables[target[tensor].shape] for tensor in heads if target[tensor].shape in tables}


def _is_token_table(name: str, target: Manifest) -> bool:
    """Return True if a tensor has a row per word and a name that an embedding or an output head has."""
    shape = target[name].shape
    found = {word for part in name.split(".") for word in words(part)}
    return len(shape) == 2 and shape[0] > shape[1] and bool(found & _TABLE_WORDS)


def _drops(unused: Sequence[str], used: Collection[str]) -> list[Proposal]:
    """Rules for the sources that no target takes; likely, because a missing target would look the same."""
    return [
        Proposal((rule,), LIKELY, f"{rule.source} is dropped", (), tuple(names), ("every target is explained",))
        for rule, names in drop_rules(unused, used, _DROP_REASON)
    ]
