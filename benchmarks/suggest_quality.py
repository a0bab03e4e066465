"""How good ``suggest`` is: right targets and certain rules on true conversions, in three orders of names.

Groups: the twelve conversions of the tests; families that the method was developed on, some written by hand; families
that were added afterwards; and the inverse of each. For the leave-out figure a family is measured once more without
the words of the vocabulary that no other family needs: the rest is due to the method.

    python benchmarks/suggest_quality.py [--orders given,sorted,shuffled] [--leave-out] [--verbose] [NAME ...]

Prints one JSON object; needs torch, diffusers and transformers (meta device only).
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from suggest_families import Conversion, Shape, inverse, load_families
from suggest_written import written_families

from port_kit.manifest import Manifest
from port_kit.remap.plan import check
from port_kit.remap.suggest import suggest, vocabulary
from port_kit.reports.plan_json import plan_map

CONVERSIONS = Path(__file__).parent.parent / "tests" / "data" / "conversions"
Table = dict[str, Shape]


def conversions() -> list[Conversion]:
    """The twelve families of the test suite."""
    found = []
    for path in sorted(CONVERSIONS.glob("*.json.gz")):
        data = json.loads(gzip.decompress(path.read_bytes()))
        source, target = ({name: tuple(shape) for name, shape in data[side].items()} for side in ("source", "target"))
        found.append(Conversion(data["family"], source, target, data["map"], True, tuple(data["dropped"])))
    return found


def _shuffled(table: Table) -> Table:
    items = list(table.items())
    random.Random(1).shuffle(items)
    return dict(items)


ORDERS: dict[str, Callable[[Table], Table]] = {
    "given": dict,
    "sorted": lambda table: dict(sorted(table.items())),
    "shuffled": _shuffled,
}


def measure(one: Conversion, order: str) -> dict[str, Any]:
    """One family in one order: shares of the targets, wrong targets of certain rules, seconds."""
    arrange = ORDERS[order]
    source, target = (Manifest.from_json(arrange(table)) for table in (one.source, one.target))
    started = time.perf_counter()
    suggestion = suggest(source, target, one.name)
    seconds = time.perf_counter() - started
    found = plan_map(check(suggestion.rules, source, target))
    right = {name for name, entry in found.items() if entry == one.map[name]}
    certain = [name for item in suggestion.proposals if item.confidence == "certain" for name in item.targets]
    return {
        "targets": len(target),
        "right": len(right) / len(target),
        "certain": len(certain) / len(target),
        "certain_wrong": sorted(set(certain) - right),
        "wrong": sorted(set(found) - right),
        "left_out": len(suggestion.missing),
        "rules": len(suggestion.rules),
        "seconds": round(seconds, 3),
    }


def words_of(one: Conversion) -> set[str]:
    """Every key of the vocabulary that some name of a family uses."""
    names = [*one.source, *one.target]
    components = {component for name in names for component in name.split(".")}
    plain = {word.lower() for component in components for word in vocabulary._WORD.findall(component)}
    keys = {key for key in vocabulary._COMPONENTS if key in components} | (plain & set(vocabulary._WORDS))
    return keys | {key for key, _ in vocabulary._PHRASES if any(key in component for component in components)}


@contextmanager
def without(keys: set[str]) -> Iterator[None]:
    """Take words out of the vocabulary for a while."""
    tables = (vocabulary._COMPONENTS, vocabulary._WORDS)
    kept = [dict(table) for table in tables]
    phrases = vocabulary._PHRASES
    for table in tables:
        for key in keys & set(table):
            del table[key]
    vocabulary._PHRASES = tuple(pair for pair in phrases if pair[0] not in keys)
    vocabulary.words.cache_clear()
    try:
        yield
    finally:
        for table, whole in zip(tables, kept, strict=True):
            table.update(whole)
        vocabulary._PHRASES = phrases
        vocabulary.words.cache_clear()


def summary(results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Figures over a group of families."""
    rights = [result["right"] for result in results.values()]
    total = sum(result["targets"] for result in results.values())
    return {
        "families": len(results),
        "right_mean": round(statistics.mean(rights), 4),
        "right_pooled": round(sum(result["right"] * result["targets"] for result in results.values()) / total, 4),
        "right_min": round(min(rights), 4),
        "certain_mean": round(statistics.mean(result["certain"] for result in results.values()), 4),
        "families_with_a_wrong_certain_rule": sorted(name for name, one in results.items() if one["certain_wrong"]),
        "seconds_max": max(result["seconds"] for result in results.values()),
    }


def group_of(one: Conversion, twelve: set[str]) -> str:
    """Which group a conversion is reported in."""
    if one.name in twelve:
        return "conversions"
    return ("developed_on" if one.developed_on else "unseen") + ("_back" if one.name.endswith("_back") else "")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--orders", default="given,sorted")
    parser.add_argument("--leave-out", action="store_true")
    parser.add_argument("--verbose", action="store_true")
    options = parser.parse_args()
    twelve = conversions()
    more = [*twelve, *written_families()]
    every = [*more, *load_families(), *filter(None, map(inverse, more))]
    chosen = [one for one in every if not options.names or one.name in options.names]
    needed = {one.name: words_of(one) for one in every}
    report: dict[str, Any] = {"benchmark": "suggest_quality", "orders": {}, "families": {}}
    for order in options.orders.split(","):
        results = {one.name: measure(one, order) for one in chosen}
        report["orders"][order] = grouped(chosen, results, {one.name for one in twelve})
        report["families"][order] = (
            results if options.verbose else {n: round(r["right"], 4) for n, r in results.items()}
        )
    if options.leave_out:
        results = {}
        for one in chosen:
            base = one.name.removesuffix("_back")
            others = set().union(*(words for name, words in needed.items() if name.removesuffix("_back") != base))
            with without(needed[one.name] - others):
                results[one.name] = measure(one, "sorted")
        report["orders"]["sorted, own words left out"] = grouped(chosen, results, {one.name for one in twelve})
    print(json.dumps(report, indent=1))


def grouped(
    chosen: list[Conversion], results: dict[str, dict[str, Any]], twelve: set[str]
) -> dict[str, dict[str, Any]]:
    """Summaries of all groups."""
    groups: dict[str, dict[str, dict[str, Any]]] = {}
    for one in chosen:
        groups.setdefault(group_of(one, twelve), {})[one.name] = results[one.name]
    return {name: summary(members) for name, members in groups.items()}


if __name__ == "__main__":
    main()
