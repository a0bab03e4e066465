"""Names per second: port_kit's mapper against vLLM's WeightsMapper and transformers' renaming, in one run.

50,000 names of a diffusion transformer (28 a block), about 20 rules. Every mapper's result is compared with the names
that are expected before it is timed. Prints one JSON object.

    python benchmarks/rename_speed.py [--blocks 1786] [--rounds 9]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import statistics
import time
from collections.abc import Callable

from port_kit.remap import Rule, RuleSet
from port_kit.remap.mapper import NameMapper

BLOCK = {
    "attn1.to_q": "self_attn.qkv",
    "attn1.to_k": "self_attn.qkv",
    "attn1.to_v": "self_attn.qkv",
    "attn1.to_out.0": "self_attn.o",
    "attn2.to_q": "cross_attn.q",
    "attn2.to_k": "cross_attn.kv",
    "attn2.to_v": "cross_attn.kv",
    "attn2.to_out.0": "cross_attn.o",
    "ffn.net.0.proj": "ffn.up",
    "ffn.net.2": "ffn.down",
}
SINGLE = {
    "attn1.norm_q.weight": "self_attn.norm_q.weight",
    "attn1.norm_k.weight": "self_attn.norm_k.weight",
    "attn2.norm_q.weight": "cross_attn.norm_q.weight",
    "attn2.norm_k.weight": "cross_attn.norm_k.weight",
    "norm2.weight": "norm3.weight",
    "norm2.bias": "norm3.bias",
    "norm1.weight": "norm_in.weight",
    "scale_shift_table": "modulation",
}
SLOTS = {"to_q": "q", "to_k": "k", "to_v": "v"}


def names_of(blocks: int) -> tuple[list[str], list[str]]:
    """Source names and what they must become."""
    pairs = {f"{old}.{leaf}": f"{new}.{leaf}" for old, new in BLOCK.items() for leaf in ("weight", "bias")} | SINGLE
    source = [f"transformer_blocks.{block}.{name}" for block in range(blocks) for name in pairs]
    target = [f"blocks.{block}.{name}" for block in range(blocks) for name in pairs.values()]
    return source, target


def our_rules() -> RuleSet:
    rules = []
    for old, new in BLOCK.items():
        slot = SLOTS.get(old.split(".")[1], "") if new.endswith("kv") else ""
        rules.append(Rule(rf"transformer_blocks\.(\d+)\.{re.escape(old)}\.(\w+)", rf"blocks.\1.{new}.\2", shard=slot))
    for old, new in SINGLE.items():
        rules.append(Rule(rf"transformer_blocks\.(\d+)\.{re.escape(old)}", rf"blocks.\1.{new}"))
    return RuleSet("dit", tuple(rules))


def vllm_mappers() -> dict[str, Callable[[list[str]], list[str]]]:
    from vllm.model_executor.models.utils import WeightsMapper

    # longer substrings first: every entry of a WeightsMapper fires
    substrings = {f".{old}.": f".{new}." for old, new in BLOCK.items() if not new.endswith("qkv")}
    substrings |= {f".{old}": f".{new}" for old, new in SINGLE.items()}
    stacked = {f".{old}.": (f".{new}.", SLOTS[old.split(".")[1]]) for old, new in BLOCK.items() if new.endswith("qkv")}
    by_substring = WeightsMapper(
        orig_to_new_prefix={"transformer_blocks.": "blocks."},
        orig_to_new_substr=substrings,
        orig_to_new_stacked=stacked,
    )
    patterns = {}
    for old, new in BLOCK.items():
        patterns[re.compile(rf"^transformer_blocks\.(\d+)\.{re.escape(old)}\.(\w+)$")] = rf"blocks.\1.{new}.\2"
    for old, new in SINGLE.items():
        patterns[re.compile(rf"^transformer_blocks\.(\d+)\.{re.escape(old)}$")] = rf"blocks.\1.{new}"
    by_regex = WeightsMapper(orig_to_new_regex=patterns)
    return {"vllm WeightsMapper, substrings": by_substring.apply_list, "vllm WeightsMapper, regex": by_regex.apply_list}


def transformers_mapper() -> Callable[[list[str]], list[str]]:
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    renamings = [WeightRenaming(rf"\.{re.escape(old)}\.", f".{new}.") for old, new in BLOCK.items()]
    renamings += [WeightRenaming(rf"\.{re.escape(old)}$", f".{new}") for old, new in SINGLE.items()]
    renamings.append(WeightRenaming(r"^transformer_blocks\.", "blocks."))
    return lambda names: [rename_source_key(name, renamings, [])[0] for name in names]


def main() -> None:
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # stdout is for the result
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--blocks", type=int, default=1786)
    options.add_argument("--rounds", type=int, default=9)
    given = options.parse_args()
    source, target = names_of(given.blocks)
    rules = our_rules()
    mappers: dict[str, Callable[[list[str]], list[str]]] = {
        # a new mapper every time: what it learns is part of what it costs
        "port_kit NameMapper": lambda names: NameMapper(rules).apply_list(names),
        **vllm_mappers(),
        "transformers WeightRenaming": transformers_mapper(),
    }
    shuffled = list(zip(source, target, strict=True))
    random.Random(1).shuffle(shuffled)
    orders = {"file order": (source, target), "shuffled": tuple(map(list, zip(*shuffled, strict=True)))}
    report: dict[str, object] = {"names": len(source), "rules": len(rules), "rounds": given.rounds, "results": {}}
    for order, (names, expected) in orders.items():
        report["results"][order] = _measure(mappers, names, expected, given.rounds)  # type: ignore[index]
    print(json.dumps(report, indent=1))


def _measure(
    mappers: dict[str, Callable[[list[str]], list[str]]], names: list[str], expected: list[str], rounds: int
) -> dict[str, object]:
    seconds: dict[str, list[float]] = {label: [] for label in mappers}
    for label, apply in mappers.items():
        if apply(names) != expected:
            wrong = next((a, b) for a, b in zip(apply(names), expected, strict=True) if a != b)
            raise SystemExit(f"{label} is wrong: {wrong}")
    for _ in range(rounds):
        for label, apply in mappers.items():
            start = time.perf_counter()
            apply(names)
            seconds[label].append(time.perf_counter() - start)
    speeds = {
        label: {
            "best_names_per_s": round(len(names) / min(times)),
            "median_names_per_s": round(len(names) / statistics.median(times)),
        }
        for label, times in seconds.items()
    }
    ours = speeds["port_kit NameMapper"]
    peers = [speed for label, speed in speeds.items() if not label.startswith("port_kit")]
    return {
        **speeds,
        "times_fastest_peer_best": round(ours["best_names_per_s"] / max(p["best_names_per_s"] for p in peers), 2),
        "times_fastest_peer_median": round(ours["median_names_per_s"] / max(p["median_names_per_s"] for p in peers), 2),
    }


if __name__ == "__main__":
    main()
