"""Architecture of towers and of the fusion transformer.

A tower is a stack of blocks on the latents of one modality. The original implementation ships one JSON file per tower.
:meth:`FusionConfig.from_dict` reads ``transformer/config.json`` of a model directory: both, and a ``rope`` section::

    {"video": {...}, "audio": {...},
     "rope": {"family": "dreamid_omni", "freqs_scaling": {"num": 31, "den": 157, "dtype": "bfloat16"}}}
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from port_kit.errors import ConfigError
from port_kit.escape import quoted

Stream = Literal["video", "audio"]
Family = Literal["dreamid_omni", "ovi", "wan"]
ScalingDtype = Literal["bfloat16", "float32", "float64"]

#: Fields that must be equal in the towers of a pair. A block holds a layer of each; keys are rotated by the table of
#: their own tower within heads of the other one; one pass normalizes a stream for both readers.
PAIR_FIELDS = ("num_layers", "head_dim", "eps")
#: Options of the original's JSON for which only one value is supported.
REQUIRED_VALUES: Mapping[str, Any] = {"qk_norm": True, "cross_attn_norm": True, "window_size": [-1, -1]}
#: Default of the original's constructor; its JSON omits the field.
DEFAULT_TEXT_DIM = 4096
#: Taps of the convolutions that embed audio in DreamID-Omni and Ovi.
AUDIO_CONV_KERNEL = 7
#: The hidden width of the audio adapter's gated convolution is rounded up to a multiple of this.
GATED_CONV_MULTIPLE = 256


@dataclass(frozen=True)
class RopeConfig:
    """Rotary positions that the checkpoint was trained with.

    Attributes:
        family: ``dreamid_omni`` has reference positions. ``ovi`` and ``wan`` do not. Audio positions of ``wan`` rotate
            complete heads, those of the others the temporal part.
        freqs_scaling: factor on the audio frequencies, before rounding.
        scaling_dtype: dtype that the factor is rounded to. It affects the positions of audio references: with 31/157,
            the first is at 760 in bfloat16 and at 759 in float32.
    """

    family: Family = "wan"
    freqs_scaling: float = 1.0
    scaling_dtype: ScalingDtype = "float64"

    def __post_init__(self) -> None:
        if self.family not in get_args(Family):
            raise ConfigError(f"rope family {quoted(self.family)} is not one of {', '.join(get_args(Family))}")
        if self.scaling_dtype not in get_args(ScalingDtype):
            raise ConfigError(
                f"rope scaling dtype {quoted(self.scaling_dtype)} is not one of {', '.join(get_args(ScalingDtype))}"
            )
        if not self.freqs_scaling > 0:
            raise ConfigError(f"rope freqs_scaling is {self.freqs_scaling}; it must be positive")


@dataclass(frozen=True)
class TowerConfig:
    """Architecture of one tower.

    Attributes:
        dim: width D of the residual stream.
        ffn_dim: hidden width of the feed-forward layers.
        num_heads: attention heads N; the head dimension is ``dim / num_heads``.
        num_layers: blocks.
        patch_size: latent values in one token along each axis: (frames, rows, columns) of video, (1,) of audio.
        in_channels: channels of the latents.
        out_channels: channels of the flow.
        conv_kernel: taps of the convolutions that embed audio, odd; None to embed with one linear.
        freq_dim: width of the sinusoidal timestep features.
        text_dim: width of the text encoder's states.
        text_len: number of tokens to which texts are zero-padded.
        eps: of every norm.
        rope: rotary positions.
        precise_time: embeddings of timesteps are computed in float32, whatever the dtype of the weights.
    """

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    patch_size: tuple[int, ...]
    in_channels: int
    out_channels: int
    conv_kernel: int | None = None
    freq_dim: int = 256
    text_dim: int = DEFAULT_TEXT_DIM
    text_len: int = 512
    eps: float = 1e-6
    rope: RopeConfig = field(default_factory=RopeConfig)
    precise_time: bool = False

    def __post_init__(self) -> None:
        if self.dim % self.num_heads or self.head_dim % 2:
            raise ConfigError(f"dim {self.dim} does not divide into {self.num_heads} heads of an even width")
        if len(self.patch_size) != 3 and self.patch_size != (1,):
            raise ConfigError(f"patch_size is {self.patch_size}; it must have 3 axes (video) or be (1,) (audio)")
        if self.conv_kernel is not None and (self.modality == "video" or self.conv_kernel % 2 == 0):
            raise ConfigError(
                f"conv_kernel of {self.modality} is {self.conv_kernel}; it must be None, or odd for audio"
            )

    @property
    def modality(self) -> Stream:
        """Modality of the latents."""
        return "audio" if len(self.patch_size) == 1 else "video"

    @property
    def head_dim(self) -> int:
        """Width H of one attention head."""
        return self.dim // self.num_heads

    @property
    def patch_dim(self) -> int:
        """Number of latent values in one token: channels times voxels of a patch."""
        return self.in_channels * math.prod(self.patch_size)

    @property
    def flow_dim(self) -> int:
        """Number of values of the flow in one token."""
        return self.out_channels * math.prod(self.patch_size)

    @property
    def gated_conv_dim(self) -> int:
        """Hidden width of the audio adapter's gated convolution: 8/3 of ``dim``, rounded up."""
        hidden = 2 * (4 * self.dim) // 3
        return -(-hidden // GATED_CONV_MULTIPLE) * GATED_CONV_MULTIPLE

    @classmethod
    def from_dict(
        cls, values: Mapping[str, Any], tower: str, *, rope: RopeConfig | None = None, conv_kernel: int | None = None
    ) -> TowerConfig:
        """Read the original's JSON of a tower.

        Args:
            values: the JSON.
            tower: name of the tower in messages.
            rope: rotary positions, which the JSON does not define; None for those of Wan.
            conv_kernel: taps of the convolutions that embed audio, which the JSON does not define either.

        Raises:
            ConfigError: a field is missing, or an option has an unsupported value.
        """
        for name, required in REQUIRED_VALUES.items():
            given = values.get(name, required)
            if (list(given) if isinstance(given, (list, tuple)) else given) != required:
                raise ConfigError(f"{tower}.{name} is {given}; only {required} is supported")
        values = {"text_dim": DEFAULT_TEXT_DIM, "out_dim": values.get("in_dim"), **values}
        same_name = ("dim", "ffn_dim", "num_heads", "num_layers", "freq_dim", "text_dim", "text_len", "eps")
        return cls(
            **{name: _field(tower, values, name) for name in same_name},
            patch_size=tuple(_field(tower, values, "patch_size")),
            in_channels=_field(tower, values, "in_dim"),
            out_channels=_field(tower, values, "out_dim"),
            conv_kernel=conv_kernel,
            rope=rope or RopeConfig(),
        )


@dataclass(frozen=True)
class FusionConfig:
    """Architecture of a fusion transformer: two towers whose blocks read each other.

    Attributes:
        video: tower of the video.
        audio: tower of the audio. Its width and heads may differ from those of the video.
    """

    video: TowerConfig
    audio: TowerConfig

    def __post_init__(self) -> None:
        for stream, tower in (("video", self.video), ("audio", self.audio)):
            if tower.modality != stream:
                raise ConfigError(f"the {stream} tower has patch_size {tower.patch_size} of {tower.modality}")
            if tower.out_channels != tower.in_channels:
                raise ConfigError(
                    f"{stream}.out_dim {tower.out_channels} differs from in_dim {tower.in_channels}",
                    hint="flows of a fusion transformer have the shapes of the latents",
                )
        for name in PAIR_FIELDS:
            video, audio = getattr(self.video, name), getattr(self.audio, name)
            if video != audio:
                raise ConfigError(
                    f"{name} is {video} in the video tower and {audio} in the audio tower; they must be equal",
                    hint=f"fused blocks require equal {', '.join(PAIR_FIELDS)}; widths and heads may differ",
                )

    @property
    def num_layers(self) -> int:
        """Number of blocks, each with a layer of both towers."""
        return self.video.num_layers

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> FusionConfig:
        """Read the JSON of both towers and the ``rope`` section.

        Raises:
            ConfigError: a section or field is missing, the towers cannot be fused, or an option has an unsupported
                value.
        """
        for section in ("video", "audio", "rope"):
            if section not in config:
                raise ConfigError(
                    f"the transformer's config has no {quoted(section)} section",
                    hint="add the original's video and audio JSON under these names, and a rope section",
                )
        rope = _read_rope(config["rope"], config["audio"])
        return cls(
            TowerConfig.from_dict(config["video"], "video", rope=rope),
            TowerConfig.from_dict(config["audio"], "audio", rope=rope, conv_kernel=AUDIO_CONV_KERNEL),
        )


def _read_rope(rope: Mapping[str, Any], audio: Mapping[str, Any]) -> RopeConfig:
    """Read a rope section; Ovi's factor is in the audio tower's JSON and is not rounded."""
    family = rope.get("family", "")
    if family == "ovi":
        return RopeConfig("ovi", float(_field("audio", audio, "temporal_rope_scaling_factor")), "float64")
    scaling = rope.get("freqs_scaling")
    if not isinstance(scaling, Mapping) or not {"num", "den", "dtype"} <= scaling.keys():
        raise ConfigError(
            f"rope family {quoted(family)} needs freqs_scaling with num, den and dtype, got {quoted(scaling)}",
            hint='for DreamID-Omni: {"num": 31, "den": 157, "dtype": "bfloat16"}',
        )
    return RopeConfig(family, scaling["num"] / scaling["den"], scaling["dtype"])


def _field(tower: str, values: Mapping[str, Any], name: str) -> Any:
    if name not in values:
        raise ConfigError(f"the {tower} tower's config has no {quoted(name)}")
    return values[name]


def _full_size(rope: dict[str, Any]) -> dict[str, Any]:
    """Return the JSON of the published towers with a rope section."""
    shared = {
        "dim": 3072,
        "ffn_dim": 14336,
        "freq_dim": 256,
        "num_heads": 24,
        "num_layers": 30,
        "text_len": 512,
        "text_dim": DEFAULT_TEXT_DIM,
        "window_size": [-1, -1],
        "qk_norm": True,
        "cross_attn_norm": True,
        "eps": 1e-6,
    }
    video = {"patch_size": [1, 2, 2], "model_type": "ti2v", "in_dim": 48, "out_dim": 48}
    audio = {"patch_size": [1], "model_type": "t2a", "in_dim": 20, "out_dim": 20}
    audio["temporal_rope_scaling_factor"] = 0.19676
    return {"video": video | shared, "audio": audio | shared, "rope": rope}


#: ``transformer/config.json`` of the full-size DreamID-Omni.
TRANSFORMER_CONFIG = _full_size(
    {"family": "dreamid_omni", "freqs_scaling": {"num": 31, "den": 157, "dtype": "bfloat16"}}
)
#: ``transformer/config.json`` of the full-size Ovi (1.0 and 1.1 share it).
OVI_TRANSFORMER_CONFIG = _full_size({"family": "ovi"})
