"""Latents to a waveform at 16 kHz."""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils import weight_norm

HOP = 320


class Vocoder(nn.Module):
    def __init__(self, latent=12, inner=48):
        super().__init__()
        self.pre = weight_norm(nn.Conv1d(latent, inner, 7, padding=3))
        self.post = weight_norm(nn.Conv1d(inner, HOP, 3, padding=1))

    def forward(self, z):
        y = self.post(F.leaky_relu(self.pre(z), 0.1))
        return torch.tanh(y).transpose(1, 2).reshape(z.shape[0], -1)
