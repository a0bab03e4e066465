"""HSDP that shards blocks before their weights are loaded, so that no rank allocates the full model.

vLLM-Omni loads the full transformer on each rank and shards it afterwards. A port instead builds its blocks within
:func:`meta_blocks` and calls :func:`shard_before_loading` first in ``load_weights``. A rank then holds its shards of
the blocks, the parameters outside of the blocks, and one checkpoint tensor::

    with meta_blocks():
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
    ...
    def load_weights(self, weights):
        shard_before_loading(self.transformer, self.od_config, self.device)
        return load_weights(self.transformer, weights, RULES)

Quantized models and ``enable_broadcast_weight_load`` use vLLM-Omni's order: they need full weights on each rank for
conversion or broadcast.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from port_kit.parallel.memory import materialize
from port_kit.regions import Region
from port_kit.targets import Target, read_targets
from port_kit.upstream.checks import require

if TYPE_CHECKING:
    from vllm_omni.diffusion.data import OmniDiffusionConfig

#: Empty module for vLLM-Omni to shard after loading; it raises an error if no module matches.
REMAINDER = "hsdp_remainder"


def shards_on_load(config: OmniDiffusionConfig | None) -> bool:
    """Return True if an engine with this configuration loads into shards; False outside of an engine."""
    if config is None or not config.parallel_config.use_hsdp:
        return False
    return config.quantization_config is None and not getattr(config, "enable_broadcast_weight_load", False)


def meta_blocks() -> AbstractContextManager[object]:
    """Return a device context for building blocks: meta if they will be sharded, else the current device."""
    from vllm_omni.diffusion.config import get_current_diffusion_config_or_none

    return torch.device("meta") if shards_on_load(get_current_diffusion_config_or_none()) else nullcontext()


@torch.no_grad()
def shard_before_loading(
    transformer: nn.Module, config: OmniDiffusionConfig, device: torch.device, *, is_root: bool = True
) -> None:
    """Shard a transformer's blocks and allocate the shards. A no-op unless :func:`shards_on_load`.

    Each block parameter gets a ``weight_loader`` that accepts full tensors, or full shards of a fused parameter, and
    copies this rank's rows. A collective call.

    Args:
        transformer: declares ``_hsdp_shard_conditions`` and optionally ``_hsdp_ignored_modules``; its blocks were built
            within :func:`meta_blocks`.
        config: the engine's configuration.
        device: device of the shards.
        is_root: vLLM-Omni shards everything outside of the blocks after loading. False for a module that is not called
            itself: other modules call its blocks and its children, each of which is sharded here.
    """
    if not shards_on_load(config):
        return
    require("hsdp_declarations")
    targets = read_targets(transformer).targets
    ignored = _ignored_parameters(transformer)
    blocks = _blocks(transformer)
    if not is_root:
        blocks += _called_children(transformer, blocks)
    if blocks:
        mesh = _mesh(config)
        policy = _policy(transformer, config)
        for block in reversed(blocks):
            replicated = ignored & set(block.parameters())
            # by default, a block that no sharded module contains would stay gathered after its first call
            fully_shard(block, mesh=mesh, reshard_after_forward=True, mp_policy=policy, ignored_params=replicated)
        if is_root:
            _add_remainder(transformer)
    materialize(transformer, device)
    for name, parameter in transformer.named_parameters():
        if isinstance(parameter, DTensor):
            _accept_full_tensors(parameter, targets[name])


def _blocks(transformer: nn.Module) -> list[nn.Module]:
    conditions = getattr(transformer, "_hsdp_shard_conditions", None) or ()
    return [
        module
        for name, module in transformer.named_modules()
        if any(condition(name, module) for condition in conditions)
    ]


def _called_children(module: nn.Module, blocks: list[nn.Module]) -> list[nn.Module]:
    """Return the children that have parameters and are no lists of blocks."""
    inside = set(blocks)
    return [
        child
        for child in module.children()
        if not inside & set(child.modules()) and next(child.parameters(), None) is not None
    ]


def _ignored_parameters(transformer: nn.Module) -> set[nn.Parameter]:
    """Return parameters that stay replicated: those of ignored modules, and those that FSDP cannot shard."""
    paths = getattr(transformer, "_hsdp_ignored_modules", None) or ()
    named = {parameter for path in paths for parameter in transformer.get_submodule(path).parameters()}
    return named | {p for p in transformer.parameters() if p.ndim == 0 or not p.is_floating_point()}


def _mesh(config: OmniDiffusionConfig) -> DeviceMesh:
    """Return the device mesh; its rows are shard groups, as in vLLM-Omni."""
    from vllm_omni.platforms import current_omni_platform

    parallel = config.parallel_config
    shape = (parallel.hsdp_replicate_size, parallel.hsdp_shard_size)
    return init_device_mesh(current_omni_platform.device_type, shape, mesh_dim_names=("replicate", "shard"))


def _policy(transformer: nn.Module, config: OmniDiffusionConfig) -> MixedPrecisionPolicy:
    """Return vLLM-Omni's policy: parameters are cast to the engine's dtype unless the transformer preserves its own."""
    keep = bool(getattr(transformer, "_hsdp_preserve_parameter_dtypes", False))
    return MixedPrecisionPolicy(param_dtype=None if keep else config.dtype, cast_forward_inputs=False)


def _add_remainder(transformer: nn.Module) -> None:
    """Make vLLM-Omni's sharding step after loading apply to everything outside of the blocks."""
    transformer.add_module(REMAINDER, nn.Identity())
    transformer._hsdp_shard_conditions = [lambda name, _module: name == REMAINDER]  # type: ignore[assignment]


def _accept_full_tensors(parameter: Tensor, full: Target) -> None:
    """Attach the loading attributes of the full parameter to its shard."""
    for name in ("output_dim", "input_dim"):  # attributes that define the shards of a fused parameter
        dim = getattr(full.tensor, name, None)
        if dim is not None:
            setattr(parameter, name, dim)
    parameter.weight_loader = RowWriter(full.spec.slots)  # type: ignore[attr-defined]


@dataclass(frozen=True)
class RowWriter:
    """``weight_loader`` of an HSDP shard that copies this rank's rows of full tensors.

    Attributes:
        slots: region of each shard of a fused parameter in the full parameter; empty for plain parameters.
    """

    slots: Mapping[str, Region]

    @torch.no_grad()
    def __call__(self, parameter: DTensor, piece: Tensor, slot: str | int = "") -> None:
        """Copy this rank's rows of ``piece``, the full parameter or one full shard of a fused parameter."""
        local = parameter.to_local()
        mesh = parameter.device_mesh
        rows, ranks = parameter.shape[0], mesh.size(-1)
        start = min(-(-rows // ranks) * mesh.get_local_rank(mesh.ndim - 1), rows)  # as torch.chunk splits
        first, last = self.slots[str(slot)][0] if slot != "" else (0, rows)
        low, high = max(start, first), min(start + local.shape[0], last)
        if low < high:
            local[low - start : high - start].copy_(piece[low - first : high - first])
