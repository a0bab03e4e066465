"""One MOVA step of two branches on several GPUs: seconds, memory and communication of parallel layouts.

Both video towers, the audio tower and the bridge are the published model's (32.66 B parameters, bfloat16) with random
weights; a denoising step runs the tower for high noise. Options and figures are those of ``parallel_scaling.py``.

    python benchmarks/mova_scaling.py --layout hsdp2 --layout cfg2 --layout ulysses2 --rounds 2 --warm-up 1
    python benchmarks/mova_scaling.py --tiny --layout hsdp2 --rounds 1       # small towers on CPU processes
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from mova_step import configs_of, inputs
from parallel_scaling import Measured, Subject, main, whole_shapes
from torch import Tensor

from port_kit.port import resolve


class MOVAScalingPipeline(Measured):
    """The towers and the bridge."""

    _dit_modules: ClassVar[list[str]] = ["transformer", "transformer_2"]
    _resident_modules: ClassVar[list[str]] = ["audio_transformer", "bridge"]
    batches_branches: ClassVar[bool] = False

    def build(self) -> None:
        """Build all parts, empty, and join them."""
        for part in parts():
            self.add_module(part.name, resolve(part.build)(self.configs[part.name]))
        for name in self._dit_modules:
            getattr(self, name).join(self.audio_transformer, self.bridge)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Fill all parts."""
        for part in parts():
            build = partial(resolve(part.build), self.configs[part.name])
            self.fill(part.name, whole_shapes(build, self.od_config.dtype), resolve(part.rules))

    def branches(self, size: tuple[int, int]) -> list[dict[str, Any]]:
        """Return two branches of different texts."""
        return [inputs(self.configs, *size, self.device, self.od_config.dtype) for _ in range(2)]


def parts() -> list[Any]:
    """Return the components of the port that denoise."""
    from port_kit.models.mova.weights import COMPONENTS
    from port_kit.port import DENOISERS

    return [part for part in COMPONENTS if part.kind in DENOISERS]


def configs(tiny: bool) -> Mapping[str, Mapping[str, Any]]:
    """Return the configuration of each part."""
    given = configs_of(tiny=tiny)
    return {**given, "transformer_2": given["transformer"]}


if __name__ == "__main__":
    main(Subject("32.66 B parameters", Path(__file__).stem, "MOVAScalingPipeline", configs, "352x640"), __doc__)
