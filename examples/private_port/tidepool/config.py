"""Tidepool's sizes, defaults and limits of requests, and its tiny model."""

from __future__ import annotations

from typing import Any

from port_kit.pipeline.prompt_request import PromptOptions
from port_kit.testing import TinyComponent

#: Content of ``transformer/config.json``. ``patch`` is (frames, rows, columns); widths are in channels.
TRANSFORMER_CONFIG: dict[str, Any] = {
    "dim": 64,
    "heads": 4,
    "layers": 2,
    "ffn_dim": 256,
    "patch": [1, 8, 8],
}
FPS = 8  # frames per second
BYTES = 256  # the prompt is read as UTF-8

OPTIONS = PromptOptions(
    steps=8, guidance_scale=3.0, height=48, width=64, size_multiple=8, max_side=512, frames=9, negative_prompt=" "
)

#: The published checkpoint: names, shapes, dtypes.
OUTLINE = {
    "patch.weight": [[64, 3, 1, 8, 8], "float32"],
    "bytes.weight": [[256, 64], "float32"],
    "time.weight": [[64, 64], "float32"],
    "layers.{0..1}.attn.{q,k,v,out}.weight": [[64, 64], "float32"],
    "layers.{0..1}.mlp.0.weight": [[256, 64], "float32"],
    "layers.{0..1}.mlp.2.weight": [[64, 256], "float32"],
    "layers.{0..1}.modulation.weight": [[256, 64], "float32"],
    "layers.{0..1}.attn.out.bias": [[64], "float32"],
    "layers.{0..1}.attn.{q,k,v}.bias": [[64], "float32"],
    "layers.{0..1}.{mlp.0,modulation}.bias": [[256], "float32"],
    "layers.{0..1}.mlp.2.bias": [[64], "float32"],
    "{patch,time}.bias": [[64], "float32"],
    "final.weight": [[192, 64], "float32"],
    "final.bias": [[192], "float32"],
}
#: The model is tiny as it is: its tiny model has random weights of the same sizes.
TINY = {"transformer": TinyComponent(OUTLINE, sizes={})}
