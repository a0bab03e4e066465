"""Hand-written modules for the tests of replacements."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

from torch import Tensor, nn


class SameFeedForward(nn.Module):
    """A feed-forward that keeps the linears of the adapted one."""

    def __init__(self, adapted: nn.Module) -> None:
        super().__init__()
        self.net = adapted.net

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return what the adapted module returns."""
        for layer in self.net:  # type: ignore[union-attr]
            hidden_states = layer(hidden_states)
        return hidden_states


class DoubledFeedForward(SameFeedForward):
    """A feed-forward with another result."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return twice what the adapted module returns."""
        return 2 * super().forward(hidden_states)


class ShrunkFeedForward(nn.Module):
    """A feed-forward with other parameters."""

    def __init__(self, adapted: nn.Module) -> None:
        super().__init__()
        self.net = nn.ModuleList([nn.Identity(), nn.Identity(), nn.Linear(4, 4, bias=False)])
        self.gate = nn.Linear(2, 2, bias=False)


class RoundedFeedForward(SameFeedForward):
    """A feed-forward with parameters of another dtype."""

    def __init__(self, adapted: nn.Module) -> None:
        super().__init__(copy.deepcopy(adapted))
        self.bfloat16()


class KeptAttention(nn.Module):
    """An attention that states nothing about the exchange of tokens."""

    def __new__(cls, adapted: Any) -> Any:
        """Return the adapted module."""
        return adapted


class ExchangingAttention(KeptAttention):
    """An attention that exchanges tokens itself."""

    exchanges_tokens: ClassVar[bool] = True


class PlannedAttention(KeptAttention):
    """An attention that keeps the calls of the plan."""

    exchanges_tokens: ClassVar[bool] = False
