"""Skip-layer guidance of a request: vLLM-Omni's options for a negative branch that omits layers.

The names and their meaning are those of ``SkipLayerGuidanceConfig`` in vLLM-Omni 0.32, under its
``uncond_skip_layers``. Its other form, a further branch with the prompt that omits layers, is rejected. vLLM-Omni's
mixin for both forms combines single tensors with one scale, so pipelines of several modalities combine by themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from port_kit.errors import InputError
from port_kit.escape import quoted
from port_kit.pipeline.inputs import check_integer, check_real

#: Options of the window and their alternative names in vLLM-Omni.
_START, _STOP = ("slg_start", "slg_start_percent"), ("slg_stop", "slg_end_percent")
#: Options of the other form of skip-layer guidance.
NOT_READ = dict.fromkeys(
    ("slg_layers", "slg_skip_layers", "slg_scale", "slg_rescaling_scale"),
    "this model omits layers only in the branch with the negative prompts, which uncond_skip_layers selects",
)


@dataclass(frozen=True)
class SkipLayers:
    """Layers that the negative branch omits, and when.

    Attributes:
        layers: indices, rising.
        start: fraction of the steps before the first step that omits them.
        stop: fraction of the steps before the first step that does not omit them any more.
    """

    layers: tuple[int, ...]
    start: float = 0.0
    stop: float = 1.0

    def at(self, step: int, steps: int) -> tuple[int, ...]:
        """Return the layers that a step omits."""
        return self.layers if self.start <= step / steps < self.stop else ()


def parse_skip_layers(options: Mapping[str, Any], *, name: str, default: int, layers: int) -> SkipLayers:
    """Check a request's options.

    Args:
        options: ``extra_args`` of the request.
        name: the port's own option, one layer or 0 for none; ``uncond_skip_layers`` has several layers.
        default: of the port's own option.
        layers: number of layers of the transformer.

    Raises:
        InputError: an option has an invalid value, or two options contradict each other.
    """
    own = check_integer(name, options.get(name, default), minimum=0, maximum=layers - 1)
    found: tuple[int, ...] = (own,) if own else ()
    if options.get("uncond_skip_layers") is not None:
        given = _parse_layers("uncond_skip_layers", options["uncond_skip_layers"], layers)
        if name in options and given != found:
            raise _contradiction(name, "uncond_skip_layers", options)
        found = given
    start, stop = (_fraction(names, options, value) for names, value in ((_START, 0.0), (_STOP, 1.0)))
    if start > stop:
        raise InputError(f"slg_start is {start}, after slg_stop, {stop}", code="input_value", hint="correct slg_start")
    return SkipLayers(found, start, stop)


def _parse_layers(name: str, value: object, layers: int) -> tuple[int, ...]:
    if isinstance(value, str):
        parts = [part.strip() for part in value.split(",")] if value.strip() else []
        value = [int(part) if part.isdecimal() and len(part) < 10 else part for part in parts]
    if not isinstance(value, (list, tuple)):
        raise InputError(
            f"{name} is {type(value).__name__}; expected a list of layers, or text such as 11,12", code="input_type"
        )
    return tuple(sorted({check_integer(name, layer, minimum=0, maximum=layers - 1) for layer in value}))


def _fraction(names: tuple[str, str], options: Mapping[str, Any], default: float) -> float:
    given = {name: check_real(name, options[name]) for name in names if options.get(name) is not None}
    if len(set(given.values())) > 1:
        raise _contradiction(*names, options)
    for name, value in given.items():
        if not 0 <= value <= 1:
            raise InputError(f"{name} is {quoted(value)}; expected a fraction of the steps, 0 to 1", code="input_value")
    return next(iter(given.values()), default)


def _contradiction(first: str, second: str, options: Mapping[str, Any]) -> InputError:
    return InputError(
        f"{first} is {quoted(options[first])} and {second} is {quoted(options[second])}; they set the same",
        code="input_value",
        hint=f"leave {first} out",
    )
