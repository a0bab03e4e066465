"""The video VAE behind the original's wrapper: diffusers' module, filled through the kit's rules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor, nn

from port_kit.models.wan.components.configs import WAN_2_2_LATENT_MEAN, WAN_2_2_LATENT_STD, vae_config
from port_kit.models.wan.weights.component_rules import VAE
from port_kit.remap import load_weights


class WanVAE_(nn.Module):
    """The network, by the original's sizes."""

    def __init__(self, **sizes: Any) -> None:
        super().__init__()
        config = vae_config(sizes)
        self.inner = AutoencoderKLWan(**{key: value for key, value in config.items() if not key.startswith("_")})

    def load_state_dict(self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False) -> None:
        """Take the original's names."""
        load_weights(self.inner, state_dict.items(), VAE)


def _video_vae(**_: Any) -> WanVAE_:
    raise RuntimeError("the runner gives the network; no file is read here")


class Wan2_2_VAE:
    """The wrapper that knows the latents' statistics."""

    def __init__(self, device: torch.device) -> None:
        self.model = _video_vae(device=device)
        self.mean, self.std = torch.tensor((WAN_2_2_LATENT_MEAN, WAN_2_2_LATENT_STD)).view(2, 1, -1, 1, 1, 1)

    def wrapped_encode(self, video: Tensor) -> Tensor:
        """Pixels to normalised latents."""
        return (self.model.inner.encode(video).latent_dist.mode() - self.mean) * (1.0 / self.std)

    def wrapped_decode(self, z: Tensor) -> Tensor:
        """Normalised latents to pixels."""
        return self.model.inner.decode(z / (1.0 / self.std) + self.mean, return_dict=False)[0]
