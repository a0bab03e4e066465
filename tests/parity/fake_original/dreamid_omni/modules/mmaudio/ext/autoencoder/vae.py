"""The audio VAE by the original's name and sizes, filled through the kit's rules."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from port_kit.models.wan.components.audio_vae import build_audio_vae
from port_kit.models.wan.weights.component_rules import AUDIO_VAE
from port_kit.remap import load_weights


class VAE(nn.Module):
    """The network."""

    def __init__(self, *, data_dim: int, embed_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.inner = build_audio_vae({"data_dim": data_dim, "embed_dim": embed_dim, "hidden_dim": hidden_dim})

    def load_state_dict(self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False) -> None:
        """Take the original's names."""
        load_weights(self.inner, state_dict.items(), AUDIO_VAE)


def get_my_vae(name: str, **_: int) -> VAE:
    """The published sizes only."""
    assert name == "16k"
    return VAE(data_dim=80, embed_dim=20, hidden_dim=384)
