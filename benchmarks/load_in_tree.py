"""The remap layer against vLLM-Omni's own ``load_weights``: its Wan transformer, from a file with the original names.

``WanTransformer3DModel`` of vLLM-Omni (1.3B's widths, fewer layers: about 2 GB in bf16) is built in this process. The
same file is streamed, in turns and with a warm cache, through the model's own ``load_weights`` and through
:func:`port_kit.remap.load_weights` with five rules; both must leave the same parameters. ``copy`` copies the same
tensors into ready memory of their own shapes. Prints one JSON object: medians in seconds, and the medians of the
ratios of each round, which a busy machine disturbs less.

    OMP_NUM_THREADS=1 python benchmarks/load_in_tree.py [--rounds 7] [--layers 22]
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

from port_kit.remap import Rule, RuleSet, load_weights

WAN = RuleSet(
    "wan",
    (
        Rule(r"blocks\.(\d+)\.attn1\.to_(q|k|v)\.(weight|bias)", r"blocks.\1.attn1.to_qkv.\3", shard=r"\2"),
        Rule(r"blocks\.(\d+)\.(attn1|attn2)\.to_out\.0\.(weight|bias)", r"blocks.\1.\2.to_out.\3"),
        Rule(r"blocks\.(\d+)\.ffn\.net\.0\.(.+)", r"blocks.\1.ffn.net_0.\2"),
        Rule(r"blocks\.(\d+)\.ffn\.net\.2\.(.+)", r"blocks.\1.ffn.net_2.\2"),
        Rule(r"scale_shift_table", "output_scale_shift_prepare.scale_shift_table"),
        Rule(r"(.+)", r"\1", fallback=True),
    ),
)


def build(layers: int) -> nn.Module:
    """vLLM-Omni's transformer with random weights."""
    from vllm_omni.diffusion.models.wan2_2.wan2_2_transformer import WanTransformer3DModel

    module = WanTransformer3DModel(num_attention_heads=12, ffn_dim=8960, num_layers=layers)
    for parameter in module.parameters():
        parameter.data.normal_(std=0.02)
    return module


def original(module: nn.Module) -> dict[str, torch.Tensor]:
    """The module's parameters under the names that Diffusers gives them."""
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in module.named_parameters():
        name = name.replace(".ffn.net_", ".ffn.net.").replace(".to_out.", ".to_out.0.")
        name = name.removeprefix("output_scale_shift_prepare.")
        if ".to_qkv." in name:
            for slot, part in zip("qkv", parameter.data.chunk(3), strict=True):
                tensors[name.replace("to_qkv", f"to_{slot}")] = part.contiguous()
        else:
            tensors[name] = parameter.data.contiguous()
    return tensors


def stream(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    with safe_open(file, framework="pt") as opened:
        for name in opened.keys():
            yield name, opened.get_tensor(name)


def copy(ready: dict[str, torch.Tensor], file: Path) -> None:
    for name, tensor in stream(file):
        ready[name].copy_(tensor)


def prove(module: nn.Module, runs: dict[str, Callable[[], object]]) -> None:
    """Each way alone fills every parameter with the same bits."""
    expected = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    for way in ("in_tree", "remap"):
        for parameter in module.parameters():
            parameter.data.fill_(torch.nan)
        runs[way]()
        for name, parameter in module.named_parameters():
            assert torch.equal(parameter, expected[name]), (way, name)


def measure(layers: int, rounds: int, folder: Path) -> dict[str, object]:
    from port_kit.runtime.single_process import single_rank

    with single_rank(dtype=torch.bfloat16), torch.inference_mode():
        module = build(layers)
        ready = original(module)
        file = folder / "model.safetensors"
        save_file(ready, file)
        runs: dict[str, Callable[[], object]] = {
            "copy": lambda: copy(ready, file),
            "in_tree": lambda: module.load_weights(stream(file)),
            "remap": lambda: load_weights(module, stream(file), WAN),
        }
        prove(module, runs)
        ready = {name: torch.zeros_like(tensor) for name, tensor in ready.items()}
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(rounds):
            for name, run in runs.items():
                start = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - start)
    pairs = (("remap", "in_tree"), ("remap", "copy"), ("in_tree", "copy"))
    return {
        "bytes": sum(tensor.nbytes for tensor in ready.values()),
        "tensors": len(ready),
        "rounds": rounds,
        "median_s": {name: round(statistics.median(times), 4) for name, times in seconds.items()},
        "ratio": {
            f"{a}_over_{b}": round(statistics.median(x / y for x, y in zip(seconds[a], seconds[b], strict=True)), 3)
            for a, b in pairs
        },
    }


def main() -> None:
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # stdout is for the result
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument("--layers", type=int, default=22)
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(given.layers, given.rounds, Path(folder)), indent=1))


if __name__ == "__main__":
    main()
