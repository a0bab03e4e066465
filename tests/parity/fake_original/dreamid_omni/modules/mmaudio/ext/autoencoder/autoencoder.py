"""Audio VAE and vocoder from their two files, as the original pairs them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn

from dreamid_omni.modules.mmaudio.ext.autoencoder.vae import get_my_vae
from port_kit.models.wan.components.vocoder import build_vocoder
from port_kit.models.wan.weights.component_rules import VOCODER
from port_kit.remap import load_weights


class BigVGAN(nn.Module):
    """The vocoder; its checkpoint lies under 'generator'."""

    def __init__(self, ckpt_path: str, config_path: Path = Path("bigvgan_vocoder.yml")) -> None:
        super().__init__()
        self.inner = build_vocoder(json.loads(Path(config_path).read_text()))
        load_weights(self.inner, torch.load(ckpt_path, weights_only=True)["generator"].items(), VOCODER)


class AutoEncoderModule(nn.Module):
    """Both."""

    def __init__(self, *, vae_ckpt_path: str, vocoder_ckpt_path: str, mode: str, need_vae_encoder: bool) -> None:
        super().__init__()
        assert need_vae_encoder
        self.vae = get_my_vae(mode)
        self.vae.load_state_dict(torch.load(vae_ckpt_path, weights_only=True))
        self.vocoder = BigVGAN(vocoder_ckpt_path)
