"""A case: the tiny configuration of a diffusers class, and its inputs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from port_kit.autoparallel.diffusers_cases.sizes import Draw, Sizes
from port_kit.autoparallel.subject import ModelScale, Subject, TokenScale


@dataclass(frozen=True)
class Case:
    """Configuration and inputs of a class.

    Attributes:
        config: arguments of the constructor.
        inputs: keyword arguments of ``forward``.
        build: constructor, if the class alone is not enough.
    """

    config: Callable[[Sizes], dict[str, Any]]
    inputs: Callable[[Draw], dict[str, Any]]
    build: Callable[[type[nn.Module], dict[str, Any]], nn.Module] | None = None

    def subject(self, name: str) -> Subject:
        """Return the case as a subject, with the class ``name`` of diffusers."""
        return Subject(
            name,
            build=lambda scale: self._model(name, scale),
            inputs=self._drawn,
            output=tensors,
        )

    def _drawn(self, tokens: TokenScale, model: ModelScale | None = None) -> dict[str, Any]:
        return self.inputs(Draw(tokens, model or ModelScale()))

    def _model(self, name: str, scale: ModelScale) -> nn.Module:
        import diffusers

        torch.manual_seed(0)
        cls, config = getattr(diffusers, name), self.config(Sizes(scale))
        with warnings.catch_warnings(), uninitialized_is_nan():
            warnings.simplefilter("ignore")
            model = self.build(cls, config) if self.build else cls(**config)
        randomize(model)
        return model.float().eval()


@contextmanager
def uninitialized_is_nan() -> Iterator[None]:
    """Fill memory that a constructor leaves uninitialized with NaN, which :func:`randomize` replaces."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def randomize(model: nn.Module) -> None:
    """Draw normal numbers for parameters that the constructor set to a constant, or not at all (NaN).

    Zeros of gates hide every block, and ones of norms hide the order of their channels. Weights of linears are scaled
    to keep the variance of their input: torch's default shrinks it to a third, which leaves small gates.
    """
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.isnan().any():
            parameter.data = noise / max(parameter.shape[-1], 1) ** 0.5
        elif parameter.numel() and bool((parameter == parameter.flatten()[0]).all()):
            parameter.data = parameter.data + 0.1 * noise
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.data *= 3**0.5


def tensors(result: Any) -> tuple[Tensor, ...]:
    """Return all tensors of a nested result, in order."""
    if isinstance(result, Tensor):
        return (result,)
    if is_dataclass(result) and not isinstance(result, Mapping):
        result = vars(result)
    values = result.values() if isinstance(result, Mapping) else result if isinstance(result, (list, tuple)) else ()
    return tuple(tensor for value in values for tensor in tensors(value))
