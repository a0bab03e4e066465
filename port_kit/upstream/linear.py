"""Linears of vLLM on a CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

from port_kit.upstream.checks import require
from port_kit.upstream.series import installed_series

if TYPE_CHECKING:
    from torch import nn

#: By series, the attribute of a layer that makes vLLM's CPU path leave the layer's weight as it is.
_KEEP_WEIGHT = {"0.30": "skip_weight_relayout", "0.32": "_cpu_skip_gemm_dispatch"}


def keep_plain_weight(layer: nn.Module) -> None:
    """Exclude an unquantized linear from vLLM's CPU kernels, which pack its weight and delete the parameter.

    Raises:
        RegistrationError: ``upstream_changed``.
    """
    from torch.nn.functional import linear

    require("cpu_linear")
    setattr(layer, _KEEP_WEIGHT[installed_series()], True)
    layer.cpu_linear = linear
