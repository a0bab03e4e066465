"""A module to infer a plan for: its construction at several scales, and its inputs at several token counts."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from port_kit.errors import ParallelError
from port_kit.escape import quoted, reason_of
from port_kit.port import resolve

if TYPE_CHECKING:
    from torch import Tensor, nn

#: These import this module.
_CASES = "port_kit.autoparallel.diffusers_cases:CASES"
_STAND_INS = "port_kit.autoparallel.attention_packages:STAND_INS"
_CPU = "port_kit.autoparallel.cpu:on_cpu"


@dataclass(frozen=True)
class ModelScale:
    """Multipliers of a tiny configuration.

    Attributes:
        depth: of the number of blocks of each list.
        heads: of the number of attention heads; the width of a head stays.
        width: of the width of a head, and of the other hidden widths.
    """

    depth: int = 1
    heads: int = 1
    width: int = 1


#: Configurations that a plan is proven at, besides the one that it was inferred from.
OTHER_SCALES = {
    "deeper": ModelScale(depth=2),
    "more_heads": ModelScale(heads=2),
    "wider": ModelScale(depth=2, heads=2, width=2),
}


@dataclass(frozen=True)
class TokenScale:
    """Steps by which token counts grow; 0 is the smallest input.

    Attributes:
        image: image or video tokens.
        text: text tokens.
        audio: audio tokens.
        batch: rows of the batch.
        masked: the masks of the inputs zero a part of their keys; otherwise they zero nothing.
    """

    image: int = 0
    text: int = 0
    audio: int = 0
    batch: int = 0
    masked: bool = False


@dataclass(frozen=True)
class Subject:
    """A module and its inputs.

    Attributes:
        name: class name of diffusers, or ``package.module:function``.
        build: return the module with seeded random weights, in evaluation mode and float32. Every part of the module
            must contribute to its output (no zero-initialized gates).
        inputs: given a :class:`TokenScale` and a :class:`ModelScale` (that of the tiny configuration if omitted; rotary
            tables have the width of a head), return seeded keyword arguments of the module's ``forward``. The number of
            tokens must grow with the steps; a step of a modality that the module lacks changes nothing.
        output: select the tensors to compare from what ``forward`` returns.
    """

    name: str
    build: Callable[[ModelScale], nn.Module]
    inputs: Callable[..., dict[str, Any]]
    output: Callable[[Any], tuple[Tensor, ...]]


def load_subject(reference: str) -> Subject:
    """Return the subject of a class of diffusers, or what ``package.module:function`` returns.

    Raises:
        ParallelError: ``plan_subject``; the class has no case, or the function returns no subject.
    """
    if ":" in reference:
        return _from_function(reference)
    cases: Any = resolve(_CASES)
    if reference not in cases:
        raise ParallelError(
            f"{reference}: expected a class of diffusers with a case, or package.module:function",
            code="plan_subject",
            hint="write a function that returns a Subject and name it as package.module:function",
            known=sorted(cases),
        )
    return cases[reference]()


def _missing(reference: str, error: ModuleNotFoundError) -> ParallelError:
    missing = error.name or str(error)
    packages: Any = resolve(_STAND_INS)
    hint = f"pip install {missing.partition('.')[0]}; if only an __init__ needs it: original_code.bare_packages"
    if missing.partition(".")[0] in packages:
        hint = f"import the code within attention_packages.attention_packages({quoted(missing.partition('.')[0])})"
    return ParallelError(f"{reference}: no module {quoted(missing)}", code="plan_subject", hint=hint)


def _from_function(reference: str) -> Subject:
    try:
        module, _, name = reference.partition(":")
        function = getattr(importlib.import_module(module), name)
        subject = function()
    except ModuleNotFoundError as error:
        raise _missing(reference, error) from error
    except (ImportError, AttributeError, TypeError) as error:
        raise ParallelError(
            f"{reference}: {reason_of(error)}",
            code="plan_subject",
            hint="name an importable function without parameters that returns a Subject",
        ) from error
    if not isinstance(subject, Subject):
        raise ParallelError(
            f"{reference}: expected a Subject, got {type(subject).__name__}",
            code="plan_subject",
            hint="return port_kit.autoparallel.subject.Subject from the function",
        )
    cpu: Any = resolve(_CPU)
    return cpu(subject)
