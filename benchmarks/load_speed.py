"""Loading a fused checkpoint: the remap layer against a plain copy, against vLLM-Omni's in-tree way, and rank-local.

A 2 GB bf16 safetensors file of a diffusion transformer (24 blocks, q, k, v apart) is loaded, with a warm cache, into
parameters that exist already:

* ``copy``: every tensor into a ready parameter of its own shape, no remap: the limit. These parameters are views of
  those of ``remap``, because the same copy takes up to a tenth longer into other pages;
* ``remap``: through ``load_weights``, q/k/v straight into the rows of one fused parameter;
* ``copy_again``: ``copy`` once more, so that one stands on each side of ``remap``; what they differ by is noise;
* ``in_tree``: the loop of vLLM-Omni's models (``stacked_params_mapping``, ``param.weight_loader``) over vLLM's linears;
* ``remap_vllm``: ``load_weights`` over the same vLLM linears;
* ``local_whole``: ``load_local``, the way of the shipped pipelines, if one rank holds everything;
* ``tp2``: ``load_local`` for one rank of two, and ``tp2_one_thread`` with one thread.

Before the timing, each way fills wiped parameters and is compared with the file. Every second round goes through the
ways backwards, so that none always comes after the same one. There is no default device, as there is none where the
engine loads: under one, every call of torch takes a microsecond of Python more.

Prints one JSON object with medians in seconds, medians of the ratios of each round (which a busy machine disturbs
less), bytes read, and the peak of private memory above the ready parameters. torch's own threads wait for each other
at the end of every tensor: ``OMP_NUM_THREADS=1`` keeps that out of ``copy`` and ``remap`` on a busy machine. ``copy``
and ``remap`` have ``torch_threads``; the rank-local reader has threads of its own, one a core of ``cores`` and at most
4, whatever torch has. So ``tp2`` compares with ``copy`` where torch has as many, and else with ``local_whole``.
``tp2_planned`` is what ``tp2`` does before it reads: headers and plan, which do not shrink with the rank's share.

    OMP_NUM_THREADS=1 python benchmarks/load_speed.py [--rounds 10] [--blocks 24] [--file FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from port_kit.manifest import Manifest
from port_kit.remap import Op, Rule, RuleSet, load_weights
from port_kit.remap.load import target_manifest
from port_kit.remap.local import load_local
from port_kit.remap.plan import check
from port_kit.targets import read_targets

WIDTH, FFN = 1536, 6912
BLOCK = {
    "attn.q.weight": (WIDTH, WIDTH),
    "attn.k.weight": (WIDTH, WIDTH),
    "attn.v.weight": (WIDTH, WIDTH),
    "attn.q.bias": (WIDTH,),
    "attn.k.bias": (WIDTH,),
    "attn.v.bias": (WIDTH,),
    "attn.o.weight": (WIDTH, WIDTH),
    "attn.o.bias": (WIDTH,),
    "ffn.0.weight": (FFN, WIDTH),
    "ffn.0.bias": (FFN,),
    "ffn.2.weight": (WIDTH, FFN),
    "ffn.2.bias": (WIDTH,),
    "cross.weight": (5 * WIDTH, WIDTH),
    "mod": (6, WIDTH),
}
_JOIN = Op.of("concat", dim=0, parts=("q", "k", "v"), sizes=("width", "width", "width"))
FUSED = RuleSet(
    "fused",
    (
        Rule(r"blocks\.(\d+)\.attn\.(q|k|v)\.(weight|bias)", r"layers.\1.attn.qkv.\3", shard=r"\2", op=_JOIN),
        Rule(r"blocks\.(\d+)\.attn\.o\.(weight|bias)", r"layers.\1.attn.o.\2"),
        Rule(r"blocks\.(\d+)\.ffn\.0\.(weight|bias)", r"layers.\1.ffn.up.\2"),
        Rule(r"blocks\.(\d+)\.ffn\.2\.(weight|bias)", r"layers.\1.ffn.down.\2"),
        Rule(r"blocks\.(\d+)\.(cross\.weight|mod)", r"layers.\1.\2"),
    ),
    {"width": WIDTH},
)
SLOTS = RuleSet("slots", tuple(Rule(r.source, r.target, shard=r.shard) for r in FUSED))


def make_file(path: Path, blocks: int) -> int:
    """Write the checkpoint; returns its bytes of tensors."""
    tensors = {}
    for block in range(blocks):
        for name, shape in BLOCK.items():
            tensors[f"blocks.{block}.{name}"] = torch.randn(shape, dtype=torch.float32).to(torch.bfloat16)
    save_file(tensors, path)
    return sum(tensor.nbytes for tensor in tensors.values())


def tree(shapes: dict[str, tuple[int, ...]]) -> nn.Module:
    """A module of bf16 parameters with these names, their memory touched."""
    root = nn.Module()
    for name, shape in shapes.items():
        owner = root
        *path, leaf = name.split(".")
        for part in path:
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = owner._modules[part]
        owner.register_parameter(leaf, nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16), requires_grad=False))
    return root


def plain_module(fused: nn.Module, blocks: int) -> nn.Module:
    """The checkpoint's own names and shapes over the memory of the fused module."""
    plain = tree({f"blocks.{block}.{name}": (0,) for block in range(blocks) for name in BLOCK})
    for block in range(blocks):
        for name, shape in BLOCK.items():
            leaf = name.replace("ffn.0", "ffn.up").replace("ffn.2", "ffn.down")
            part, start = name.partition(".")[2].partition(".")[0], 0
            if part in {"q", "k", "v"}:
                leaf, start = leaf.replace(f".{part}.", ".qkv."), "qkv".index(part) * WIDTH
            room = fused.get_parameter(f"layers.{block}.{leaf}").data
            plain.get_parameter(f"blocks.{block}.{name}").data = room[start : start + shape[0]]
    return plain


def fused_module(blocks: int) -> nn.Module:
    shapes: dict[str, tuple[int, ...]] = {}
    for block in range(blocks):
        start = f"layers.{block}."
        shapes[start + "attn.qkv.weight"], shapes[start + "attn.qkv.bias"] = (3 * WIDTH, WIDTH), (3 * WIDTH,)
        for name in ("attn.o.weight", "attn.o.bias", "cross.weight", "mod"):
            shapes[start + name] = BLOCK[name]
        for old, new in (("ffn.0", "ffn.up"), ("ffn.2", "ffn.down")):
            for leaf in ("weight", "bias"):
                shapes[f"{start}{new}.{leaf}"] = BLOCK[f"{old}.{leaf}"]
    return tree(shapes)


class Split(nn.Module):
    """One rank's half of a linear, with the attributes that vLLM's parallel linears have."""

    def __init__(self, inputs: int, outputs: int, kind: str) -> None:
        super().__init__()
        self.tp_rank, self.tp_size = 0, 2
        self.input_size, self.output_size = inputs, outputs
        row = kind == "row"
        self.input_size_per_partition = inputs // 2 if row else inputs
        self.output_size_per_partition = outputs if row else outputs // 2
        if kind == "qkv":
            self.head_size, self.v_head_size = 128, 128
            self.total_num_heads = self.total_num_kv_heads = outputs // 3 // 128
            self.num_heads = self.num_kv_heads = self.total_num_heads // 2
            self.num_kv_head_replicas = 1
        shape = (self.output_size_per_partition, self.input_size_per_partition)
        self.weight = nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(shape[0], dtype=torch.bfloat16), requires_grad=False)
        self.weight.output_dim, self.weight.input_dim = 0, 1
        if not row:
            self.bias.output_dim = 0


def split_module(blocks: int) -> nn.Module:
    """Rank 0 of 2."""
    root = tree({f"layers.{block}.mod": BLOCK["mod"] for block in range(blocks)})
    for layer in root.layers.children():
        attn, ffn = nn.Module(), nn.Module()
        attn.qkv, attn.o = Split(WIDTH, 3 * WIDTH, "qkv"), Split(WIDTH, WIDTH, "row")
        ffn.up, ffn.down = Split(WIDTH, FFN, "column"), Split(FFN, WIDTH, "row")
        layer.attn, layer.ffn, layer.cross = attn, ffn, Split(WIDTH, 5 * WIDTH, "column")
        del layer.cross.bias
    return root


def vllm_module(blocks: int) -> nn.Module:
    """vLLM's own linears, in a world of one rank."""
    from port_kit.parallel.linear import column, qkv, row

    root = tree({f"layers.{block}.mod": BLOCK["mod"] for block in range(blocks)})
    for number, layer in enumerate(root.layers.children()):
        attn, ffn, name = nn.Module(), nn.Module(), f"layers.{number}"
        attn.qkv, attn.o = qkv(WIDTH, 128, WIDTH // 128, None, name + ".qkv"), row(WIDTH, WIDTH, None, name + ".o")
        ffn.up, ffn.down = column(WIDTH, FFN, None, name + ".up"), row(FFN, WIDTH, None, name + ".down")
        layer.attn, layer.ffn = attn, ffn
        layer.cross = column(WIDTH, 5 * WIDTH, None, name + ".cross")
        del layer.cross.bias
    for parameter in root.parameters():
        parameter.data.zero_()
    return root


def stream(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    with safe_open(file, framework="pt") as opened:
        for name in opened.keys():
            yield name, opened.get_tensor(name)


def copy(module: nn.Module, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
    parameters = dict(module.named_parameters())
    for name, tensor in weights:
        parameters[name].data.copy_(tensor)


def in_tree(module: nn.Module, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
    """The loop that vLLM-Omni's diffusion models have, each in its own words."""
    from vllm.model_executor.model_loader.weight_utils import default_weight_loader

    stacked = [(".attn.qkv.", ".attn.q.", "q"), (".attn.qkv.", ".attn.k.", "k"), (".attn.qkv.", ".attn.v.", "v")]
    renames = [("blocks.", "layers."), (".ffn.0.", ".ffn.up."), (".ffn.2.", ".ffn.down.")]
    parameters = dict(module.named_parameters())
    loaded = set()
    for name, tensor in weights:
        for old, new in renames:
            name = name.replace(old, new)
        for fused, part, slot in stacked:
            if part in name:
                name = name.replace(part, fused)
                parameters[name].weight_loader(parameters[name], tensor, slot)
                break
        else:
            loader = getattr(parameters[name], "weight_loader", default_weight_loader)
            loader(parameters[name], tensor)
        loaded.add(name)


def plan(module: nn.Module, file: Path) -> None:
    """What a rank-local load does before it reads."""
    source, targets = Manifest.from_safetensors(file), read_targets(module)
    assert check(SLOTS, source, target_manifest(module, targets), opaque=targets.opaque).ok


def private_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


def peak_above(run: Callable[[Iterator[tuple[str, torch.Tensor]]], object], file: Path) -> int:
    """Peak of private memory over the start, looked at between tensors."""
    start = private_bytes()
    peak = [start]

    def watched() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in stream(file):
            yield name, tensor
            peak[0] = max(peak[0], private_bytes())

    run(watched())
    return max(peak[0], private_bytes()) - start


def main() -> None:
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # stdout is for the result
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=10)
    options.add_argument("--blocks", type=int, default=24)
    options.add_argument("--file", type=Path, help="Keep the checkpoint here.")
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file = given.file or Path(folder) / "model.safetensors"
        if not file.is_file():
            make_file(file, given.blocks)
        print(json.dumps(measure(file, given.blocks, given.rounds), indent=1))


def measure(file: Path, blocks: int, rounds: int) -> dict[str, object]:
    from port_kit.runtime.single_process import single_rank

    with single_rank(dtype=torch.bfloat16, default_device=False):  # the engine's loader loads without one, too
        fused = fused_module(blocks)
        modules = {"copy": plain_module(fused, blocks), "remap": fused, "vllm": vllm_module(blocks)}
        half = split_module(blocks)
        runs: dict[str, Callable[[], object]] = {
            "copy": lambda: copy(modules["copy"], stream(file)),
            "remap": lambda: load_weights(modules["remap"], stream(file), FUSED),
            "copy_again": lambda: copy(modules["copy"], stream(file)),
            "in_tree": lambda: in_tree(modules["vllm"], stream(file)),
            "remap_vllm": lambda: load_weights(modules["vllm"], stream(file), SLOTS),
            "local_whole": lambda: load_local(modules["remap"], file, FUSED),
            "tp2": lambda: load_local(half, file, SLOTS),
            "tp2_one_thread": lambda: load_local(half, file, SLOTS, threads=1),
        }
        filled = {"in_tree": modules["vllm"], "remap_vllm": modules["vllm"], "tp2": half, "tp2_one_thread": half}
        for name, run in runs.items():  # this warms the cache too
            _check(name, run, filled.get(name, fused), file)
        runs["tp2_planned"] = lambda: plan(half, file)
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for number in range(rounds):
            for name in list(runs)[:: -1 if number % 2 else 1]:
                start = time.perf_counter()
                runs[name]()
                seconds[name].append(time.perf_counter() - start)
        local = load_local(half, file, SLOTS)
        above = peak_above(lambda weights: load_weights(modules["remap"], weights, FUSED), file)
    pairs = zip(seconds["copy"], seconds["copy_again"], strict=True)
    seconds["both_copies"] = [statistics.mean(pair) for pair in pairs]
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    largest = max(tensor.nbytes for tensor in modules["copy"].parameters())
    return {
        "bytes": sum(parameter.nbytes for parameter in modules["copy"].parameters()),
        "rounds": rounds,
        "torch_threads": torch.get_num_threads(),
        "cores": len(os.sched_getaffinity(0)),
        "median_s": {name: round(value, 4) for name, value in medians.items()},
        "best_s": {name: round(min(times), 4) for name, times in seconds.items()},
        "remap_over_copy": _ratio(seconds, "remap", "both_copies"),
        "remap_over_each_copy": [_ratio(seconds, "remap", way) for way in ("copy", "copy_again")],
        "copy_again_over_copy": _ratio(seconds, "copy_again", "copy"),
        "local_over_copy": _ratio(seconds, "local_whole", "both_copies"),
        "remap_over_in_tree": _ratio(seconds, "remap_vllm", "in_tree"),
        "private_bytes_above": above,
        "largest_tensor": largest,
        "tp2_bytes_share": round(local.bytes_read / local.bytes_whole, 3),
        "tp2_time_share": {way: _ratio(seconds, "tp2", way) for way in ("copy", "remap", "local_whole")},
        "tp2_one_thread_time_share": _ratio(seconds, "tp2_one_thread", "copy"),
        "tp2_read_whole": list(local.read_whole),
    }


def _ratio(seconds: dict[str, list[float]], way: str, base: str) -> float:
    """Median over the rounds of one way's time over another's."""
    return round(statistics.median(a / b for a, b in zip(seconds[way], seconds[base], strict=True)), 3)


def _check(way: str, run: Callable[[], object], module: nn.Module, file: Path) -> None:
    """One way fills wiped parameters with the file's values, all of them."""
    for parameter in module.parameters():
        parameter.data.fill_(-1)
    run()
    with safe_open(file, framework="pt") as opened:
        for name, parameter in module.named_parameters():
            source = name.replace("layers.", "blocks.").replace("ffn.up", "ffn.0").replace("ffn.down", "ffn.2")
            parts = [opened.get_tensor(source.replace("qkv", part)) for part in ("qkv" if "qkv" in name else "-")]
            ranks = sum(map(len, parts)) // len(parameter)
            wanted = torch.cat([part[: len(part) // ranks] for part in parts])
            wanted = wanted[:, : parameter.shape[1]] if wanted.dim() > 1 else wanted
            assert torch.equal(parameter, wanted), f"{way} did not fill {name} with the file's values"


if __name__ == "__main__":
    main()
