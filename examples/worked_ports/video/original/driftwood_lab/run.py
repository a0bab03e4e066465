"""Sampling of Driftwood."""

import torch


def tokens(text):
    return torch.tensor([(list(text.encode()) + [0] * 64)[:64]])


def dream(net, projector, z, caption, n=20, strength=4.0):
    """From noise z to frames [B, 3, F, H, W] in [-1, 1]."""
    wanted, empty = tokens(caption), tokens("")
    for i in range(n):
        t = torch.tensor([1 - i / n])
        free, told = net(z, t, empty), net(z, t, wanted)
        z = z - (free + strength * (told - free)) / n
    return projector(z)
