"""Tests of the tiny configurations of diffusers classes."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from port_kit.autoparallel.diffusers_cases import CASES
from port_kit.autoparallel.subject import OTHER_SCALES, ModelScale, Subject, TokenScale

#: One of each kind: two streams, one stream and a text, linear attention, packed tokens, audio.
SAMPLE = ("Cosmos3OmniTransformer", "FluxTransformer2DModel", "SanaTransformer2DModel", "StableAudioDiTModel")
#: FlexAttention has no backward on the CPU.
WITHOUT_GRADIENTS = {"AnyFlowFARTransformer3DModel"}
SCALES = {"base": ModelScale(), **OTHER_SCALES}
TOKENS = (TokenScale(), TokenScale(image=1), TokenScale(text=1), TokenScale(audio=2), TokenScale(1, 2, 1, 1, True))


def exported_classes() -> set[str]:
    """Return the names of the transformer classes that diffusers exports."""
    import diffusers
    from diffusers.models import transformers
    from diffusers.models.modeling_utils import ModelMixin

    classes = {name: cls for name, cls in vars(transformers).items() if inspect.isclass(cls)}
    return {name for name, cls in classes.items() if issubclass(cls, ModelMixin) and name in dir(diffusers)}


def leaves(value: Any) -> Iterator[Tensor]:
    """Yield the tensors of nested inputs."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from leaves(item)


def test_every_exported_class_has_a_case() -> None:
    assert set(CASES) == exported_classes()


def check_scales(subject: Subject) -> None:
    """Check that a subject runs at all scales, and that each scale of the model changes its parameters."""
    parameters = set()
    for scale in SCALES.values():
        model = subject.build(scale)
        parameters.add(sum(parameter.numel() for parameter in model.parameters()))
        for tokens in TOKENS:
            with torch.no_grad():
                outputs = subject.output(model(**subject.inputs(tokens, scale)))
            assert outputs and all(output.isfinite().all() for output in outputs)
    assert len(parameters) == len(SCALES)


def check_tokens(subject: Subject) -> None:
    """Check that some step of tokens changes the shapes of tensors that the model reads."""
    shapes = {str([leaf.shape for leaf in leaves(subject.inputs(tokens))]) for tokens in TOKENS[:4]}
    assert len(shapes) > 1 or subject.name == "PriorTransformer"  # its positions have a fixed length


def check_seeds(subject: Subject) -> None:
    """Check that two builds have the same parameters, and two draws the same inputs."""
    first, second = (dict(subject.build(ModelScale()).named_parameters()) for _ in range(2))
    assert all(torch.equal(parameter, second[name]) for name, parameter in first.items())
    pairs = zip(leaves(subject.inputs(TOKENS[-1])), leaves(subject.inputs(TOKENS[-1])), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def check_gradients(subject: Subject) -> None:
    """Check that most parameters of blocks receive gradients, so that none of their paths is closed."""
    model = subject.build(ModelScale())
    outputs = subject.output(model(**subject.inputs(TokenScale(1, 1, 1, 1))))
    sum(output.square().sum() for output in outputs if output.is_floating_point()).backward()
    blocks = {name: parameter for name, parameter in model.named_parameters() if any(map(str.isdigit, name.split(".")))}
    live = [name for name, parameter in blocks.items() if parameter.grad is not None and parameter.grad.any()]
    assert len(live) > 0.75 * len(blocks)


def check(name: str) -> None:
    """Run all checks of a case."""
    subject = CASES[name]()
    assert subject.name == name
    check_scales(subject)
    check_tokens(subject)
    check_seeds(subject)
    if name not in WITHOUT_GRADIENTS:
        check_gradients(subject)


@pytest.mark.parametrize("name", SAMPLE)
def test_case(name: str) -> None:
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(CASES) - set(SAMPLE)))
def test_other_case(name: str) -> None:
    check(name)
