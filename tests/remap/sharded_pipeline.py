"""A pipeline of vLLM's own parallel layers, filled twice on every rank: from the stream, and from its part of the file.

No request is served. The results of both loaders are compared within the rank, before vLLM rearranges
weights for its kernels.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.layers.fused_moe import FusedMoE
from vllm_omni.diffusion.model_loader.diffusers_loader import DiffusersPipelineLoader

from port_kit.remap import Op, Rule, RuleSet, load_weights
from port_kit.remap.local import load_local

HIDDEN, HEAD, HEADS, KV_HEADS, FFN, EXPERT, EXPERTS, WORDS = 32, 8, 8, 2, 64, 32, 4, 96
RULES = RuleSet(
    "sharded",
    (
        Rule(r"l\.(q|k|v)\.(weight|bias)", r"qkv.\2", shard=r"\1"),
        Rule(r"l\.gate\.weight", "gate_up.weight", shard="0"),
        Rule(r"l\.up\.weight", "gate_up.weight", shard="1"),
        Rule(r"l\.both\.weight", ("up_gate.weight", "up_gate.weight"), shard=("1", "0"), op=Op.of("split", dim=0)),
        Rule(r"l\.(o|down)\.(weight|bias)", r"\1.\2"),
        Rule(r"l\.wide\.weight", "wide.weight", op="transpose"),
        Rule(r"l\.turned\.weight", "turned.weight", op=Op.of("reorder", dim=0)),
        Rule(r"l\.experts\.(\d+)\.(w1|w3)\.weight", "experts.routed_experts.w13_weight", shard=r"\1.\2"),
        Rule(r"l\.experts\.(\d+)\.w2\.weight", "experts.routed_experts.w2_weight", shard=r"\1.w2"),
        Rule(r"l\.words\.weight", "words.weight"),
        Rule(r"l\.head\.(weight|bias)", r"head.\1"),
        Rule(r"l\.norm\.weight", "norm.weight"),
    ),
)
#: Shapes of the checkpoint by name.
SHAPES: dict[str, tuple[int, ...]] = {
    "l.q.weight": (HEADS * HEAD, HIDDEN),
    "l.k.weight": (KV_HEADS * HEAD, HIDDEN),
    "l.v.weight": (KV_HEADS * HEAD, HIDDEN),
    "l.q.bias": (HEADS * HEAD,),
    "l.k.bias": (KV_HEADS * HEAD,),
    "l.v.bias": (KV_HEADS * HEAD,),
    "l.gate.weight": (FFN, HIDDEN),
    "l.up.weight": (FFN, HIDDEN),
    "l.both.weight": (2 * FFN, HIDDEN),
    "l.o.weight": (HIDDEN, HEADS * HEAD),
    "l.o.bias": (HIDDEN,),
    "l.down.weight": (HIDDEN, FFN),
    "l.wide.weight": (HIDDEN, FFN),
    "l.turned.weight": (FFN, HIDDEN),
    "l.words.weight": (WORDS, HIDDEN),
    "l.head.weight": (WORDS, HIDDEN),
    "l.head.bias": (WORDS,),
    "l.norm.weight": (HIDDEN,),
    **{f"l.experts.{n}.{half}.weight": (EXPERT, HIDDEN) for n in range(EXPERTS) for half in ("w1", "w3")},
    **{f"l.experts.{n}.w2.weight": (HIDDEN, EXPERT) for n in range(EXPERTS)},
}


@dataclass(frozen=True)
class Filled:
    """Result of one rank: the tensors of both loaders, and the bytes read by the rank-local one."""

    state: dict[str, Tensor]
    differing: tuple[str, ...]
    unwritten: tuple[str, ...]
    names_agree: bool
    bytes_read: int
    bytes_whole: int
    read_whole: tuple[str, ...]


def layers() -> nn.ModuleDict:
    """One of each kind of parallel layer."""
    made = nn.ModuleDict(
        {
            "qkv": QKVParallelLinear(HIDDEN, HEAD, HEADS, KV_HEADS),
            "gate_up": MergedColumnParallelLinear(HIDDEN, [FFN, FFN], bias=False),
            "up_gate": MergedColumnParallelLinear(HIDDEN, [FFN, FFN], bias=False),
            "o": RowParallelLinear(HEADS * HEAD, HIDDEN),
            "down": RowParallelLinear(FFN, HIDDEN, bias=False),
            "wide": ColumnParallelLinear(HIDDEN, FFN, bias=False),
            "turned": ColumnParallelLinear(HIDDEN, FFN, bias=False),
            "experts": FusedMoE(
                num_experts=EXPERTS,
                top_k=2,
                hidden_size=HIDDEN,
                intermediate_size=EXPERT,
                tp_size=get_tensor_model_parallel_world_size(),
                dp_size=1,
                pcp_size=1,
            ),
            "words": VocabParallelEmbedding(WORDS, HIDDEN),
            "head": ParallelLMHead(WORDS, HIDDEN, bias=True),
            "norm": nn.LayerNorm(HIDDEN, bias=False),
        }
    )
    clear(made)
    return made


def clear(module: nn.Module) -> None:
    """Fill all tensors with NaN, so that unwritten elements are visible."""
    with torch.no_grad():
        for tensor in module.state_dict().values():
            tensor.fill_(float("nan"))


class ShardedPipeline(nn.Module):
    """The interface that vLLM-Omni needs to load a pipeline."""

    _dit_modules: ClassVar = ["transformer"]
    _encoder_modules: ClassVar = []
    _vae_modules: ClassVar = []
    _resident_modules: ClassVar = []
    dummy_run_num_frames = 0

    def __init__(self, *, od_config: OmniDiffusionConfig, prefix: str = "") -> None:
        super().__init__()
        self.folder = Path(od_config.model) / "transformer"
        self.transformer = layers()
        self.filled: Filled | None = None
        self.weights_sources = [
            DiffusersPipelineLoader.ComponentSource(
                model_or_path=od_config.model,
                subfolder="transformer",
                revision=None,
                prefix="transformer.",
                fall_back_to_pt=False,
            )
        ]

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Fill the layers from the stream, then anew from the file, and compare."""
        names = load_weights(self.transformer, weights, RULES, prefix="transformer.")
        mine = {name: tensor.clone() for name, tensor in self.transformer.state_dict().items()}
        clear(self.transformer)
        done = load_local(self.transformer, self.folder, RULES, prefix="transformer.")
        theirs = self.transformer.state_dict()
        self.filled = Filled(
            mine,
            tuple(name for name, tensor in mine.items() if not torch.equal(tensor, theirs[name])),
            tuple(name for name, tensor in mine.items() if tensor.isnan().any()),
            done.loaded == names,
            done.bytes_read,
            done.bytes_whole,
            done.read_whole,
        )
        return names

    def forward(self, req: Any, **_: Any) -> Any:
        raise AssertionError("this pipeline is only loaded")


def register() -> None:
    """Register the pipeline in this process."""
    from vllm_omni.diffusion.registry import register_diffusion_model

    register_diffusion_model(
        model_arch="ShardedPipeline", module_name="tests.remap.sharded_pipeline", class_name="ShardedPipeline"
    )


def filled(pipeline: nn.Module) -> Filled:
    """The probe: return the tensors of this rank."""
    assert isinstance(pipeline, ShardedPipeline) and pipeline.filled is not None
    return pipeline.filled
