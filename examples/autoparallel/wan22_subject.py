"""Subject of the transformer of ``Wan-Video/Wan2.2``, text to video."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from port_kit.autoparallel.diffusers_cases.case import randomize
from port_kit.autoparallel.original_code import bare_packages
from port_kit.autoparallel.subject import ModelScale, Subject, TokenScale

bare_packages("wan", "wan.modules")  # they import all pipelines

from wan.modules.model import WanModel  # noqa: E402


def _build(scale: ModelScale) -> nn.Module:
    torch.manual_seed(0)
    model = WanModel(
        text_len=12,
        in_dim=4,
        dim=48 * scale.heads * scale.width,
        ffn_dim=80 * scale.heads * scale.width,
        freq_dim=32,
        text_dim=10,
        out_dim=4,
        num_heads=4 * scale.heads,
        num_layers=2 * scale.depth,
    )
    randomize(model)
    return model.float().eval()


def _inputs(tokens: TokenScale, _model: ModelScale | None = None) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    frames, batch = 3 + tokens.image, 1 + tokens.batch
    rows = frames * 15 + (5 if tokens.masked else 0)  # more rows than tokens: keys are masked by their number

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "x": [draw(4, frames, 6, 10) for _ in range(batch)],
        "t": torch.full((batch, rows), 400.0),
        "context": [draw(7 + 2 * tokens.text, 10) for _ in range(batch)],
        "seq_len": rows,
    }


def make_subject() -> Subject:
    """Return the subject."""
    return Subject("wan22_subject:make_subject", _build, _inputs, output=tuple)
