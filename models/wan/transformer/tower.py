"""A tower alone: a Wan transformer on the latents of one modality.

Models that connect towers by modules of their own between the blocks run the parts of :meth:`WanTower.forward`:
:meth:`~WanTower.begin`, each of :attr:`~WanTower.blocks`, and :meth:`~WanTower.predict`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor, nn
from vllm.model_executor.models.utils import maybe_prefix

from port_kit.models.wan.transformer.block import TowerBlock
from port_kit.models.wan.transformer.config import TowerConfig
from port_kit.models.wan.transformer.modality_io import (
    ModalityAdapter,
    StreamBoundaries,
    StreamConditioning,
    TextContext,
)
from port_kit.parallel.hsdp import meta_blocks
from port_kit.parallel.sequence import make_sp_plan

if TYPE_CHECKING:
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig


def stacked_parameters(packed: Mapping[str, Sequence[str]]) -> list[tuple[str, str, str | int]]:
    """Return vLLM's ``stacked_params_mapping`` of fused projections and their parts."""
    return [
        (f".{name}", f".{part}", part if name == "qkv" else index)
        for name, parts in packed.items()
        for index, part in enumerate(parts)
    ]


class WanTower(ModalityAdapter):
    """Transformer that predicts the flow of one modality.

    Args:
        config: architecture.
        quant_config: quantization of the linears; None for none.
        prefix: path of this module in the pipeline, for quantization and diagnostics.
    """

    _layerwise_offload_blocks_attrs: ClassVar = ["blocks"]
    _hsdp_shard_conditions: ClassVar = [lambda _name, module: isinstance(module, TowerBlock)]
    _sp_plan: ClassVar = make_sp_plan({"shard": (3, 4)}, {"gather": (3,)})
    packed_modules_mapping: ClassVar = {"qkv": ["q", "k", "v"], "kv": ["k", "v"], "gate_up": ["w1", "w3"]}
    stacked_params_mapping: ClassVar = stacked_parameters(packed_modules_mapping)
    #: Class of the blocks.
    block: ClassVar[type[TowerBlock]] = TowerBlock

    def __init__(
        self, config: TowerConfig, *, quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__(config, quant_config, prefix)
        self.config = config
        with meta_blocks():
            self.blocks = nn.ModuleList(
                self.block(config, i, quant_config, maybe_prefix(prefix, f"blocks.{i}"))
                for i in range(config.num_layers)
            )

    def forward(self, latents: Tensor, timestep: Tensor, text: Tensor | TextContext) -> Tensor:
        """Predict the flow of latents without references.

        Args:
            latents: of a video ``[B, C, F, H, W]``, of audio ``[B, A, C]``.
            timestep: ``[B]`` or 0-dim, in 0..1000.
            text: states ``[B, T, text_dim]``, unpadded, or a :class:`TextContext` that caches their projections.

        Returns:
            The flow, shaped as the latents, with ``out_channels`` channels.

        Raises:
            InputError: the latents do not divide into patches, or the text is too long.
        """
        tokens, conditioning = self.begin(latents, timestep, text)
        for block in self.blocks:
            tokens = block(tokens, conditioning)
        return self.predict(tokens, conditioning)

    def begin(
        self,
        latents: Tensor,
        timestep: Tensor,
        text: Tensor | TextContext,
        *,
        bridge_rope: Tensor | None = None,
        boundaries: StreamBoundaries | None = None,
    ) -> tuple[Tensor, StreamConditioning]:
        """Return this rank's tokens ``[B, S, D]`` and the conditioning of the blocks.

        The first arguments are those of :meth:`forward`; the others are in
        :meth:`~port_kit.models.wan.transformer.modality_io.ModalityAdapter.embed`.
        """
        rope = self.rope.table(self.patch_embedding.grid(latents), latents.device)
        return self.embed(latents, rope, timestep, text, bridge_rope=bridge_rope, boundaries=boundaries)
