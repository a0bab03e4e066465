"""Sampling of Murmur."""

import torch


def spell(text, limit=64):
    return torch.tensor([(list(text.encode()) + [0] * limit)[:limit]])


def speak(model, vocoder, noise, text, nfe=20, cfg=4.0):
    z, yes, no = noise, spell(text), spell("")
    for i in range(nfe):
        t = torch.ones(1) * (1 - i / nfe)
        v = model(z, t, no)
        v = v + cfg * (model(z, t, yes) - v)
        z = z - v / nfe
    return vocoder(z)[0]
