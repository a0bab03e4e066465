"""Small pipelines around transformers with convolutions over tokens: the example of the guide, and a grid."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from vllm_omni.diffusion.data import DiffusionOutput
from vllm_omni.diffusion.worker.request_batch import DiffusionRequestBatch

from port_kit.parallel.sequence import PaddedAttention, SPBoundary, make_sp_plan, pad_tokens, padded_length
from port_kit.parallel.token_conv import TokenConv
from port_kit.remap import Rule, RuleSet
from tests.parallel.transformer_pipeline import TransformerOnlyPipeline, write_model

#: Fused projections, and their parts in a checkpoint.
FUSED = {".qkv.": ("q", "k", "v"), ".text.feed_forward.up.": ("gate", "up")}
PAGE = Path(__file__).parents[2] / "docs" / "token_streams.md"
REFERENCE = PAGE.with_name("port_reference.md")


def example(title: str, page: Path = PAGE) -> dict[str, Any]:
    """Run the Python code below a title of a page, by default the guide; return its names."""
    section = re.split(r"^## ", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    (text,) = (part for part in section if part.startswith(f"{title}\n"))
    names: dict[str, Any] = {"__name__": f"{__name__}.{title}"}
    for code in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        exec(compile(code, str(page), "exec", dont_inherit=True), names)
    return names


class ConvPipeline(TransformerOnlyPipeline):
    """The example of the guide on ``tokens`` tokens."""

    rules: ClassVar[RuleSet] = RuleSet(
        name="conv",
        rules=(
            Rule(r"blocks\.(\d+)\.([qkv])\.(weight|bias)", r"blocks.\1.qkv.\3", shard=r"\2"),
            Rule(r"blocks\.(\d+)\.(norm1|norm2|out|up|down)\.(weight|bias)", r"blocks.\1.\2.\3"),
            Rule(r"(embed|head)\.(weight|bias)", r"\1.\2"),
        ),
    )

    def build_transformer(self, config: Mapping[str, Any]) -> nn.Module:
        """Build the transformer of the guide."""
        return example("Convolutions over tokens")["AudioTransformer"](**config)

    def forward(self, req: DiffusionRequestBatch, **_: Any) -> DiffusionOutput:
        """Call the transformer once."""
        tokens = req.sampling_params.extra_args["tokens"]
        latents = torch.randn(2, tokens, 16, generator=torch.Generator().manual_seed(tokens))
        return DiffusionOutput(output=self.transformer(latents))


class GridTransformer(nn.Module):
    """Convolutions of all kinds over the flattened frames of a grid, and one attention."""

    _sp_plan: ClassVar = make_sp_plan({"shard": (3,)}, {"gather": (3,)})

    def __init__(self) -> None:
        super().__init__()
        self.shard, self.gather = SPBoundary(), SPBoundary()
        self.convs = nn.ModuleList(
            [
                TokenConv(16, 16, (3, 1, 1)),
                TokenConv(16, 16, (3, 3, 3)),
                TokenConv(16, 16, (1, 3, 5), role="grouped", groups=16, bias=False),
                TokenConv(16, 16, (3, 3, 1), dilation=(2, 1, 1), groups=4),
                TokenConv(16, 16, 5, dilation=3, role="grouped", groups=4),
            ]
        )
        self.attn = PaddedAttention(num_heads=2, head_size=8, num_kv_heads=2, softmax_scale=8**-0.5, causal=False)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Return ``[B, T, 16]``."""
        length = x.shape[1]
        before = self.convs[1](x, length, grid=grid)  # outside of the sharded region
        (x,) = self.shard(pad_tokens(before))
        for conv in self.convs:
            y = _grouped(conv, x, length, grid) if conv.role == "grouped" else conv(x, length, grid=grid)
            x = x + 0.3 * y
        heads = x.unflatten(-1, (2, 8))
        x = x + self.attn(heads, heads, heads, padded_length(length)).flatten(2)
        (x,) = self.gather(x)
        return x[:, :length]


def _grouped(conv: TokenConv, x: Tensor, length: int, grid: tuple[int, int]) -> Tensor:
    """Give a convolution its groups, and return the channels of all groups."""
    from vllm.distributed import get_tp_group

    group = get_tp_group()
    own = x.chunk(group.world_size, -1)[group.rank_in_group]
    y = conv(own, length, grid=grid)
    return group.all_gather(y, -1) if group.world_size > 1 else y


class GridPipeline(ConvPipeline):
    """A grid of ``grid`` frames, rows and columns."""

    rules: ClassVar[RuleSet] = RuleSet(name="grid", rules=(Rule(r"convs\.(\d+)\.(weight|bias)", r"convs.\1.\2"),))

    def build_transformer(self, config: Mapping[str, Any]) -> nn.Module:
        """Build the transformer."""
        return GridTransformer()

    def forward(self, req: DiffusionRequestBatch, **_: Any) -> DiffusionOutput:
        """Call the transformer once."""
        frames, rows, columns = req.sampling_params.extra_args["grid"]
        latents = torch.randn(1, frames * rows * columns, 16, generator=torch.Generator().manual_seed(1))
        return DiffusionOutput(output=self.transformer(latents, (rows, columns)))


def write_checkpoint(folder: Path, pipeline: str, model: nn.Module, config: Mapping[str, Any]) -> Path:
    """Write a model directory with random weights; fused projections of the model are separate in the checkpoint."""
    random = torch.Generator().manual_seed(0)
    tensors = {}
    for name, parameter in model.named_parameters():
        value = torch.randn(parameter.shape, generator=random) * parameter[0].numel() ** -0.5
        names = next((parts for fused, parts in FUSED.items() if fused in name), None)
        if names is None:
            tensors[name] = value
            continue
        for part, piece in zip(names, value.chunk(len(names)), strict=True):
            stem, leaf = name.rsplit(".", 1)
            tensors[f"{stem.rpartition('.')[0]}.{part}.{leaf}"] = piece.contiguous()
    save_file(tensors, write_model(folder, pipeline, config) / "model.safetensors")
    return folder
