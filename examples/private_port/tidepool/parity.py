"""Tidepool beside its original implementation: outputs of blocks that ``record_goldens.py`` recorded."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file

from port_kit.parity import Bound, Case, Pair
from port_kit.parity.hooks import outputs_of
from port_kit.pipeline.loading import load_pipeline
from port_kit.runtime.single_process import single_rank

BOUND = Bound(max_abs=5e-5, why="float32; fused projections and attention sum in another order")
#: The last part of a recorded module's name, and the port's module with the same output.
_PARTS = {"attn": "out", "mlp": "down"}


def counterpart(name: str) -> str:
    """Return the port's module for a module of the original: ``layers.0.attn`` is ``blocks.0.out``."""
    words = name.split(".")
    if words[0] != "layers":
        return name
    return ".".join(["blocks", words[1], *(_PARTS[part] for part in words[2:])])


def cases(goldens: Path) -> Iterator[Case]:
    """List what ``port-kit verify parity tidepool`` compares."""
    yield Case("transformer fp32", lambda: _transformer(goldens))


def _transformer(goldens: Path) -> Iterable[Pair]:
    """Run the transformer on the recorded input, and compare the outputs of modules in the order of the original."""
    contents = json.loads((goldens / "SET.json").read_text(encoding="utf-8"))
    folder = goldens / "transformer"
    inputs, recorded = load_file(folder / "inputs.safetensors"), load_file(folder / "intermediates_fp32.safetensors")
    modules = {name: counterpart(name) for name in contents["modules"]}
    with single_rank(torch.float32), torch.inference_mode():
        transformer = load_pipeline(contents["model"]).transformer
        with outputs_of(transformer, modules.values()) as found:
            velocity = transformer(**inputs)
    for name, module in modules.items():
        expected = recorded[name]
        if name == "patch":  # a convolution there: (B, D, F, H, W); a linear of flat patches here
            expected = expected.flatten(2).transpose(1, 2)
        yield Pair(name, found[module], expected, BOUND)
    yield Pair("velocity", velocity, load_file(folder / "outputs_fp32.safetensors")["velocity"], BOUND)
