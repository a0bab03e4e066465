"""HSDP's memory while a model is loaded: real ranks, every storage counted from the first to the last weight."""

from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from port_kit.models.wan.weights.transformer_rules import TRANSFORMER
from port_kit.parallel import hsdp
from port_kit.parallel.layout import Layout
from port_kit.parallel.memory import local_bytes
from port_kit.remap.local import LocalLoad, load_local
from port_kit.testing.workers import run_workers
from tests.helpers import slow
from tests.parallel import transformer_pipeline

LAYERS = 24


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that are alive, and the most that ever were."""

    def __init__(self) -> None:
        super().__init__()
        self.known: set[int] = set()
        self.live = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves((args, result)):  # memory of other libraries is counted when it is used
            if isinstance(value, DTensor):
                value = value.to_local()
            if isinstance(value, Tensor) and value.device.type != "meta":
                self.add(value.untyped_storage())
        return result

    def add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self.remove, key, size)

    def remove(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


@pytest.fixture(scope="module")
def deep_model(transformer_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The transformer-only model with eight copies of its three blocks, so that blocks dominate, as in real models."""
    folder = tmp_path_factory.mktemp("models") / "deep"
    shutil.copytree(transformer_model, folder)
    config = json.loads((folder / "transformer/config.json").read_text())
    short = config["video"]["num_layers"]
    for tower in ("video", "audio"):
        config[tower]["num_layers"] = LAYERS
    (folder / "transformer/config.json").write_text(json.dumps(config))
    weights = load_file(folder / "transformer/model.safetensors")
    for name in list(weights):
        tower, found, rest = name.partition(".blocks.")
        layer, _, leaf = rest.partition(".")
        for copy in range(int(layer) + short, LAYERS, short) if found else ():
            weights[f"{tower}.blocks.{copy}.{leaf}"] = weights[name].clone()
    save_file(weights, folder / "transformer/model.safetensors")
    return folder


def load(model: Path, layout: str, prepare: Callable[[], object] = lambda: None) -> list[tuple[int, int]]:
    """Load a model; return (most bytes that were alive at once, bytes of parameters in the end) of each rank."""
    counters: list[LiveBytes] = []

    def setup() -> None:
        transformer_pipeline.register()
        prepare()
        counters.append(LiveBytes())
        counters[0].__enter__()

    def probe(pipeline: nn.Module) -> tuple[int, int]:
        torch.distributed.barrier()  # a rank that leaves early takes the others' rendezvous with it
        return counters[0].peak, local_bytes(pipeline)

    config = {"parallel_config": Layout.parse(layout).parallel_config}
    return [result.probe for result in run_workers(model, [], config=config, setup=setup, probe=probe)]


def _load_whole() -> None:
    """As vLLM-Omni does by itself: load everything, then shard."""
    hsdp.shards_on_load = lambda config: False


def test_no_rank_has_a_complete_model_while_it_loads(deep_model: Path) -> None:
    ((_, whole),) = load(deep_model, "single")
    for peak, held in load(deep_model, "hsdp2"):
        assert held <= 0.53 * whole
        assert peak <= 0.66 * whole
    ((naive, _), _) = load(deep_model, "hsdp2", _load_whole)
    assert naive >= whole  # the counter includes the memory of a rank without this


@pytest.mark.slow
def test_four_ranks_have_less_than_two(deep_model: Path) -> None:
    ((_, whole),) = load(deep_model, "single")
    for peak, held in load(deep_model, "hsdp4"):
        assert held <= 0.28 * whole
        assert peak <= 0.44 * whole


def _load_from_files(self: Any, weights: Any) -> set[str]:
    """Load as the shipped pipelines do: every rank reads its own part of the files."""
    next(iter(weights), None)
    hsdp.shard_before_loading(self.transformer, self.od_config, torch.device("cpu"))
    folder = Path(self.od_config.model) / "transformer"
    self.done = load_local(self.transformer, folder, TRANSFORMER, prefix="transformer.")
    return self.done.loaded


def _shards(pipeline: Any) -> tuple[dict[str, Tensor], LocalLoad | None]:
    torch.distributed.barrier()
    state = {
        name: (tensor.to_local() if isinstance(tensor, DTensor) else tensor).clone()
        for name, tensor in pipeline.transformer.state_dict().items()
    }
    return state, getattr(pipeline, "done", None)


@pytest.mark.parametrize("layout", ["hsdp2", *slow("tp2", "hsdp4")])
def test_ranks_read_only_their_own_shards(deep_model: Path, layout: str) -> None:
    def from_files() -> None:
        transformer_pipeline.register()
        transformer_pipeline.TransformerOnlyPipeline.load_weights = _load_from_files

    config = {"parallel_config": Layout.parse(layout).parallel_config}
    streamed = run_workers(deep_model, [], config=config, setup=transformer_pipeline.register, probe=_shards)
    read = run_workers(deep_model, [], config=config, setup=from_files, probe=_shards)
    for one, other in zip(streamed, read, strict=True):
        state, done = other.probe
        assert state.keys() == one.probe[0].keys()
        assert all(torch.equal(tensor, one.probe[0][name]) for name, tensor in state.items())
        # everything outside of the blocks is complete on every rank
        assert done.bytes_read < {"hsdp2": 0.6, "hsdp4": 0.4, "tp2": 0.65}[layout] * done.bytes_whole
