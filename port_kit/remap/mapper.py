"""Names only: what the rules make of a name, fast, in the form that vLLM's ``WeightsMapper`` has.

Lists of module names (quantization's ignore lists, LoRA's targets) and streams of tensors are mapped by the same rules
as loading. Rules run once a layer template; after that a name costs one dictionary look-up.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any

from port_kit.remap.expressions import evaluate_sizes
from port_kit.remap.lower import expand
from port_kit.remap.matching import Matcher
from port_kit.remap.names import PROBES, section
from port_kit.remap.ops import JOINING, Scope, is_joining
from port_kit.remap.rules import Rule, RuleSet

if TYPE_CHECKING:
    from torch import Tensor

Mapped = tuple[str, str]
#: Target before and after the layer number; None where the tensor is dropped.
Entry = tuple[str, str] | None
#: Stands for a name of which nothing is known yet.
_UNKNOWN: Any = ()
#: Names of one layer in a row below which, as often in a row, a list counts as being in no order.
_FEW = 4
#: Names in no order that are mapped before an order is looked for again.
_SCATTERED = 4096


class NameMapper:
    """Maps names by a rule set; names that no rule speaks of stay as they are.

    A tensor that is split over several targets maps to the first of them.

    Args:
        rules: the rule set.
        sizes: named sizes, for targets with computed numbers.
        fused: map parts of fused parameters to the fused name; without it each part keeps its own last name
            (``blocks.0.attn.q`` beside ``blocks.0.attn.k``), as consumers that name modules want it.
    """

    def __init__(self, rules: RuleSet, sizes: Mapping[str, int] | None = None, *, fused: bool = True) -> None:
        self.rules = rules
        self.fused = fused
        self._given = dict(sizes or {})
        self._sizes = evaluate_sizes(rules.sizes, sizes or {})
        self._matcher = Matcher(rules.rules)
        self._literal = self._matcher.literal
        self._plain: dict[str, Mapped | None] = {}
        #: what follows a layer number, by what stands before it; and the numbers that no pattern spells out
        self._tables: dict[str, dict[str, Entry]] = {}
        self._free: set[str] = set()

    # -- one name ----------------------------------------------------------------------------------------------

    def map(self, name: str) -> Mapped | None:
        """The target of a name and its slot (empty where the target is not fused); None where it is dropped."""
        if name not in self._plain:
            self._plain[name] = self._work_out(name)
        return self._plain[name]

    def _work_out(self, name: str) -> Mapped | None:
        found = self._matcher.find(name)
        if not found:
            return self._as_module(name)
        rule = self.rules.rules[found[0]]
        if rule.drop:
            return None
        match = self._matcher.match(found[0], name)
        scope = Scope(self._sizes, rule.label, name, match, ())
        target, shard = expand(rule.targets[0], match, scope), expand(rule.shards[0], match, scope)
        if not self.fused:
            return _own_name(rule, name, target, shard), ""
        return target, "" if _joins(rule) else shard

    def _as_module(self, name: str) -> Mapped:
        """A module's name maps as that of its weight does."""
        parameter = f"{name}.weight"
        if not self._matcher.find(parameter):
            return name, ""
        mapped = self._work_out(parameter)
        if mapped is None or not mapped[0].endswith(".weight"):
            return name, ""
        return mapped[0].removesuffix(".weight"), mapped[1]

    # -- many names --------------------------------------------------------------------------------------------

    def map_all(self, names: Iterable[str]) -> list[Mapped | None]:
        """:meth:`map` of every name."""
        return [self.map(name) for name in names]

    def apply_list(self, values: list[str]) -> list[str]:
        """The targets of all names that are not dropped; the method of vLLM's mapper.

        In a checkpoint's own order most names share their layer with the name before, which is the shortest way; names
        in no order are taken apart one by one.
        """
        mapped: list[str] = []
        names = iter(values)
        while self._in_order(names, mapped):
            self._scattered(islice(names, _SCATTERED), mapped)
        return mapped

    def _in_order(self, names: Iterator[str], mapped: list[str]) -> bool:
        """Map names until they change their layer all the time; whether any may be left."""
        append = mapped.append
        prefix, size, number = "\0", 1, ""
        table: dict[str, Entry] = {}
        hits = misses = 0
        for name in names:
            if name.startswith(prefix):
                tail = name[size:]
                hits += 1
            else:
                misses = misses + 1 if hits < _FEW else 0
                prefix, number, table = self._section(name)
                size, hits = len(prefix), 0
                tail = name[size:]
            entry = table.get(tail, _UNKNOWN)
            if entry is _UNKNOWN:
                found = self._learn(name, prefix, number, tail, table)
                if found is not None:
                    append(found[0])
            elif entry:
                append(number.join(entry))
            if misses > _FEW:
                return True
        return False

    def _scattered(self, names: Iterable[str], mapped: list[str]) -> None:
        """Map names in any order; those of a layer whose rest is known take two look-ups."""
        append, tables, free = mapped.append, self._tables, self._free
        for name in names:
            try:
                head, number, tail = name.split(".", 2)
                entry = tables[head][tail]
            except (KeyError, ValueError):  # another depth, or not seen before
                self._one(name, mapped)
                continue
            if number not in free:
                self._one(name, mapped)
            elif entry:
                append(number.join(entry))

    def _one(self, name: str, mapped: list[str]) -> None:
        prefix, number, table = self._section(name)
        tail = name[len(prefix) :]
        entry = table.get(tail, _UNKNOWN)
        if entry is _UNKNOWN:
            found = self._learn(name, prefix, number, tail, table)
            if found is not None:
                mapped.append(found[0])
        elif entry:
            mapped.append(number.join(entry))

    def _section(self, name: str) -> tuple[str, str, dict[str, Entry]]:
        """The part of a name up to its first layer number, that number, and what is known of what follows."""
        found = section(name, self._literal) if self._literal is not None else None
        if found is None:
            return "\0", "", {}
        head, number = found
        self._free.add(number)
        return f"{head}{number}.", number, self._tables.setdefault(head[:-1], {})

    def _learn(self, name: str, prefix: str, number: str, tail: str, table: dict[str, Entry]) -> Mapped | None:
        """Work out a name; where its layer number goes through unchanged, so does every other one."""
        if not number:
            return self.map(name)
        start = prefix[: -len(number) - 1]
        tried = [self._work_out(f"{start}{probe}.{tail}") for probe in PROBES]
        if tried == [None, None]:
            table[tail] = None
            return None
        if None not in tried:
            pieces = [one[0].split(probe) for one, probe in zip(tried, PROBES, strict=True) if one is not None]
            if pieces[0] == pieces[1] and len(pieces[0]) == 2:
                table[tail] = (pieces[0][0], pieces[0][1])
        return self.map(name)

    # -- the rest of vLLM's interface --------------------------------------------------------------------------

    def apply(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Rename a stream of tensors; a slot is set as ``tensor.shard_id``, as vLLM's mapper does."""
        for name, tensor in weights:
            mapped = self.map(name)
            if mapped is None:
                continue
            if mapped[1]:
                tensor.shard_id = int(mapped[1]) if mapped[1].isdigit() else mapped[1]  # type: ignore[attr-defined]
            yield mapped[0], tensor

    def apply_dict(self, values: dict[str, Any]) -> dict[str, Any]:
        """Rename the keys of a dictionary; the method of vLLM's mapper."""
        mapped = {name: self.map(name) for name in values}
        return {found[0]: values[name] for name, found in mapped.items() if found is not None}

    def get_rename_mapper(self) -> NameMapper:
        """A mapper for names of modules: parts of fused parameters keep names of their own, nothing is dropped."""
        kept = RuleSet(
            self.rules.name,
            tuple(rule for rule in self.rules if not rule.drop and not rule.keep),
            self.rules.sizes,
        )
        return NameMapper(kept, self._given, fused=False)


def _joins(rule: Rule) -> bool:
    return any(op.name in JOINING or is_joining(op.name) for op in rule.op)


def _own_name(rule: Rule, source: str, target: str, shard: str) -> str:
    """The name that a part of a fused parameter would have if it were not fused: the source's own last module."""
    if not shard or _joins(rule) or source.count(".") < 1 or target.count(".") < 1:
        return target
    *path, _, leaf = ["", *target.split(".")]
    return ".".join([*path, source.split(".")[-2], leaf]).lstrip(".")


def stacked_params_mapping(rules: RuleSet, sources: Iterable[str]) -> list[tuple[str, str, str | int]]:
    """The fused modules of a rule set as vLLM-Omni's LoRA loader wants them: ``(".to_qkv", ".to_q", "q")``.

    Args:
        rules: the rule set.
        sources: names of a checkpoint.
    """
    whole, own = NameMapper(rules), NameMapper(rules).get_rename_mapper()
    found: dict[tuple[str, str, str | int], None] = {}
    for name in sources:
        mapped, single = whole.map(name), own.map(name)
        if mapped is None or single is None or not mapped[1] or mapped[0].count(".") < 1:
            continue
        slot: str | int = int(mapped[1]) if mapped[1].isdigit() else mapped[1]
        found[(f".{mapped[0].split('.')[-2]}", f".{single[0].split('.')[-2]}", slot)] = None
    return list(found)
