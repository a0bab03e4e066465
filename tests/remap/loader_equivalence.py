"""Comparison of a module's own ``load_weights`` with rules, bit by bit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import nn

from port_kit.manifest import Manifest, TensorSpec
from port_kit.remap import RuleSet, load_weights

RULE_SETS = Path(__file__).parent / "rule_sets" / "vllm_omni"
Weights = Iterable[tuple[str, torch.Tensor]]


def random_checkpoint(manifest: Mapping[str, TensorSpec], seed: int = 0) -> dict[str, torch.Tensor]:
    """Normally distributed tensors for a manifest, the same for one seed."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(spec.shape, generator=generator, dtype=torch.float32).to(getattr(torch, spec.dtype))
        for name, spec in manifest.items()
    }


def manifest_of(tensors: Mapping[str, torch.Tensor]) -> Manifest:
    """The manifest of tensors in memory."""
    return Manifest(
        {name: (tensor.shape, str(tensor.dtype).removeprefix("torch.")) for name, tensor in tensors.items()}
    )


def cleared(module: nn.Module) -> nn.Module:
    """Fill every parameter and persistent buffer with NaN, so that unwritten elements are visible."""
    with torch.no_grad():
        for tensor in module.state_dict().values():
            tensor.fill_(float("nan"))
    return module


def filled(module: nn.Module, load: Callable[[Weights], object], weights: Weights) -> dict[str, torch.Tensor]:
    """A copy of all that a way of loading puts into a module."""
    cleared(module)
    load(weights)
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def assert_loaders_agree(
    module: nn.Module,
    in_tree: Callable[[Weights], object],
    rules: RuleSet,
    weights: Mapping[str, torch.Tensor],
    sizes: Mapping[str, int] | None = None,
) -> None:
    """Assert that rules leave the same bits in every parameter as the module's own loader, from names in any order."""
    expected = filled(module, in_tree, list(weights.items()))
    backwards = list(weights.items())[::-1]
    loaded: set[str] = set()
    got = filled(module, lambda given: loaded.update(load_weights(module, given, rules, sizes=sizes)), backwards)
    assert loaded == {name for name, _ in module.named_parameters()} | {
        name for name, _ in module.named_buffers()
    } & set(got)
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert not tensor.isnan().any(), f"{name} is not written by its own loader"
        assert torch.equal(_bits(got[name]), _bits(tensor)), f"{name} differs"


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)
