"""Subject of MMAudio's joint audio flow transformer, of the original code of ``hkchengrex/MMAudio``."""

from __future__ import annotations

from typing import Any

import torch
from mmaudio.model.networks import MMAudio
from torch import Tensor, nn

from port_kit.autoparallel.diffusers_cases.case import randomize
from port_kit.autoparallel.subject import ModelScale, Subject, TokenScale

_LATENT, _CLIP, _SYNC, _TEXT = 6, 10, 12, 14


def _build(scale: ModelScale) -> nn.Module:
    torch.manual_seed(0)
    model = MMAudio(
        latent_dim=_LATENT,
        clip_dim=_CLIP,
        sync_dim=_SYNC,
        text_dim=_TEXT,
        hidden_dim=64 * scale.heads * scale.width,
        depth=4 * scale.depth,
        fused_depth=2 * scale.depth,
        num_heads=4 * scale.heads,
        latent_seq_len=21,
        clip_seq_len=8,
        sync_seq_len=16,
        latent_mean=torch.zeros(_LATENT),
        latent_std=torch.ones(_LATENT),
        v2=True,
    )
    randomize(model)
    model.register_forward_pre_hook(_set_lengths, with_kwargs=True)
    return model.float().eval()


def _set_lengths(model: Any, _args: Any, inputs: dict[str, Tensor]) -> None:
    """Announce the token counts, as the original inference code does before it samples."""
    model._text_seq_len = inputs["text_f"].shape[1]
    model.update_seq_lengths(*(inputs[name].shape[1] for name in ("latent", "clip_f", "sync_f")))


def _inputs(tokens: TokenScale, _model: ModelScale | None = None) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    batch = 1 + tokens.batch

    def draw(count: int, width: int) -> Tensor:
        return torch.randn(batch, count, width, generator=generator)

    return {
        "latent": draw(21 + 5 * tokens.audio, _LATENT),
        "clip_f": draw(8 + 3 * tokens.image, _CLIP),
        "sync_f": draw(16 + 8 * tokens.image, _SYNC),
        "text_f": draw(7 + 2 * tokens.text, _TEXT),
        "t": torch.full((batch,), 0.4),
    }


def make_subject() -> Subject:
    """Return the subject."""
    return Subject("mmaudio_subject:make_subject", _build, _inputs, output=lambda result: (result,))
