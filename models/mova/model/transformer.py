"""The denoisers of MOVA: a video tower per noise level, whose layers call an audio tower and a bridge that both share.

Shape suffixes: B batch, C channels of the video's input and c of its flow, F H W latent frames, rows, columns, V video
tokens, A audio tokens, a channels of the audio latents, T text tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from cache_dit import ForwardPattern
from torch import Tensor
from vllm_omni.diffusion.cache.cachedit import CacheDiTAdapterConfig
from vllm_omni.diffusion.config import get_current_diffusion_config_or_none

from port_kit.errors import ConfigError
from port_kit.escape import quoted
from port_kit.models.mova.config import TOWER_OPTIONS
from port_kit.models.mova.model.bridge import DualTowerBridge
from port_kit.models.wan.transformer.block import TowerBlock
from port_kit.models.wan.transformer.config import TowerConfig
from port_kit.models.wan.transformer.modality_io import StreamBoundaries, StreamConditioning, TextContext
from port_kit.models.wan.transformer.tower import WanTower
from port_kit.parallel.cancellation import check_cancellation_between_blocks
from port_kit.parallel.layers import engine_quantization
from port_kit.parallel.sequence import SPBoundary, make_sp_plan

if TYPE_CHECKING:
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

#: Options of a tower's JSON of which only one value is supported: the published one.
REQUIRED_VALUES: Mapping[str, Any] = {**TOWER_OPTIONS, "vae_type": "dac"}
#: Tokens to which texts are padded; padding is attended.
TEXT_LENGTH = 512


@dataclass(frozen=True)
class Partner:
    """Modules that the layers of all video towers call. They belong to the pipeline, not to a tower.

    Attributes:
        audio: tower of the audio.
        bridge: has a layer for each of the audio tower.
    """

    audio: WanTower
    bridge: DualTowerBridge


class BridgedBlock(TowerBlock):
    """Layer ``index`` of the video tower, after the layers of the bridge and of the audio tower of this index."""

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        video: StreamConditioning,
        audio: StreamConditioning,
        partner: Partner,
    ) -> tuple[Tensor, Tensor]:
        """Return the streams after this layer, video first.

        The names of the tokens are those of Cache-DiT's two-stream pattern.

        Args:
            hidden_states: video tokens ``[B, V, D]``.
            encoder_hidden_states: audio tokens ``[B, A, E]``; unchanged by layers that the audio tower does not have.
            video: conditioning of the video.
            audio: conditioning of the audio.
            partner: audio tower and bridge.
        """
        if self.index < len(partner.audio.blocks):
            positions = video.bridge_rotary, audio.bridge_rotary
            bridge = partner.bridge.layers[self.index]
            hidden_states, encoder_hidden_states = bridge(hidden_states, encoder_hidden_states, *positions)
            encoder_hidden_states = partner.audio.blocks[self.index](encoder_hidden_states, audio)
        return super().forward(hidden_states, video), encoder_hidden_states


class DualTowerTransformer(WanTower):
    """Video tower that predicts the flows of video and audio, with the help of a :class:`Partner`.

    It has the boundaries of both streams: vLLM-Omni applies a plan of sequence parallelism to each denoiser, and would
    shard the tokens of a shared tower once per denoiser.

    Attributes:
        partner: set by :meth:`join`.
    """

    block: ClassVar[type[TowerBlock]] = BridgedBlock
    _sp_plan: ClassVar = make_sp_plan(
        {"shard": (3, 4, 4), "audio_shard": (3, 4, 4)}, {"gather": (3,), "audio_gather": (3,)}
    )
    _cache_dit_adapter_config: ClassVar = CacheDiTAdapterConfig(
        block_forward_patterns={"blocks": ForwardPattern.Pattern_0}, has_separate_cfg=True, check_forward_pattern=False
    )
    partner: Partner

    def __init__(
        self, config: TowerConfig, *, quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__(config, quant_config=quant_config, prefix=prefix)
        self.engine = get_current_diffusion_config_or_none()
        self.audio_shard, self.audio_gather = SPBoundary(), SPBoundary()

    def join(self, audio: WanTower, bridge: DualTowerBridge) -> None:
        """Use an audio tower and a bridge.

        Raises:
            ConfigError: they do not fit this tower.
        """
        own, other, between = self.config, audio.config, bridge.config
        found = (own.dim, other.dim, own.head_dim, other.head_dim, other.num_layers)
        expected = (between.video_dim, between.audio_dim, between.head_dim, between.head_dim, between.layers)
        if found != expected:
            raise ConfigError(
                f"widths, head widths and audio layers of the towers are {found}, those of the bridge {expected}",
                hint="use the config.json of one checkpoint for all of them",
            )
        if own.num_layers < other.num_layers:
            raise ConfigError(f"the video tower has {own.num_layers} layers, the audio tower {other.num_layers}")
        self.partner = Partner(audio, bridge)

    def forward(  # type: ignore[override]
        self,
        video: Tensor,
        audio: Tensor,
        timestep: Tensor,
        video_text: Tensor | TextContext,
        audio_text: Tensor | TextContext,
        *,
        fps: float,
        audio_timestep: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Predict both flows.

        Args:
            video: latents, mask and condition of a video, ``[B, C, F, H, W]``.
            audio: latents ``[B, A, a]``.
            timestep: ``[B]`` or 0-dim, in 0..1000.
            video_text: states ``[B, T, text_dim]`` for this tower, unpadded, or a :class:`TextContext` that caches
                their projections over the steps.
            audio_text: the same states for the audio tower.
            fps: frames of the video per second; they place the video's tokens beside those of the audio.
            audio_timestep: of the audio; None for that of the video.

        Returns:
            The flows ``[B, c, F, H, W]`` and ``[B, A, a]``.

        Raises:
            InputError: the latents do not divide into patches, or the text is too long.
        """
        partner = self.partner
        ropes = partner.bridge.ropes(self.patch_embedding.grid(video), audio.shape[1], fps, like=video)
        boundaries = StreamBoundaries(self.audio_shard, self.audio_gather)
        v, of_video = self.begin(video, timestep, video_text, bridge_rope=ropes[0])
        a, of_audio = partner.audio.begin(
            audio,
            timestep if audio_timestep is None else audio_timestep,
            audio_text,
            bridge_rope=ropes[1],
            boundaries=boundaries,
        )
        for index, block in enumerate(self.blocks):
            check_cancellation_between_blocks(index, len(self.blocks), self.engine)
            v, a = block(v, a, of_video, of_audio, partner=partner)
        return self.predict(v, of_video), partner.audio.predict(a, of_audio, boundaries)


def read_tower(values: Mapping[str, Any], tower: str) -> TowerConfig:
    """Read the original's JSON of a tower.

    Raises:
        ConfigError: a field is missing, or an option has an unsupported value.
    """
    for name, required in REQUIRED_VALUES.items():
        if values.get(name, required) != required:
            raise ConfigError(f"{tower}.{name} is {quoted(values[name])}; only {quoted(required)} is supported")
    config = TowerConfig.from_dict({"text_len": TEXT_LENGTH, **values}, tower)
    return replace(config, precise_time=True)


def build_transformer(config: Mapping[str, Any], name: str = "transformer") -> DualTowerTransformer:
    """Build a video tower of a ``config.json`` on the current default device and dtype.

    Args:
        config: content of the file.
        name: of the component.
    """
    return DualTowerTransformer(read_tower(config, name), quant_config=engine_quantization(), prefix=name)


def build_transformer_2(config: Mapping[str, Any]) -> DualTowerTransformer:
    """Build the video tower of low noise."""
    return build_transformer(config, "transformer_2")


def build_audio_transformer(config: Mapping[str, Any]) -> WanTower:
    """Build the audio tower of an ``audio_transformer/config.json`` on the current default device and dtype."""
    name = "audio_transformer"
    return WanTower(read_tower(config, name), quant_config=engine_quantization(), prefix=name)
