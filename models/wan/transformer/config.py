"""Architecture of the fusion transformer.

The original implementation ships one JSON file per tower. :meth:`FusionConfig.from_dict` reads both and requires equal
values of :data:`SHARED_FIELDS`. ``transformer/config.json`` of a model directory adds a ``rope`` section::

    {"video": {...}, "audio": {...},
     "rope": {"family": "dreamid_omni", "freqs_scaling": {"num": 31, "den": 157, "dtype": "bfloat16"}}}
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from port_kit.errors import ConfigError

Family = Literal["dreamid_omni", "ovi"]
ScalingDtype = Literal["bfloat16", "float32", "float64"]

#: Fields that must be equal in both towers, because one block holds a layer of each.
SHARED_FIELDS = ("dim", "ffn_dim", "freq_dim", "num_heads", "num_layers", "text_len", "text_dim", "eps")
#: Options of the original's JSON for which only one value is supported.
REQUIRED_VALUES: Mapping[str, Any] = {"qk_norm": True, "cross_attn_norm": True, "window_size": [-1, -1]}
#: Default of the original's constructor; its JSON omits the field.
DEFAULT_TEXT_DIM = 4096
#: The hidden width of the audio adapter's gated convolution is rounded up to a multiple of this.
GATED_CONV_MULTIPLE = 256


@dataclass(frozen=True)
class RopeConfig:
    """Rotary positions that the checkpoint was trained with.

    Attributes:
        family: ``dreamid_omni`` has reference positions; ``ovi`` does not.
        freqs_scaling: factor on the audio frequencies, before rounding.
        scaling_dtype: dtype that the factor is rounded to. It affects the positions of audio references: with 31/157,
            the first is at 760 in bfloat16 and at 759 in float32.
    """

    family: Family = "dreamid_omni"
    freqs_scaling: float = 31 / 157
    scaling_dtype: ScalingDtype = "bfloat16"

    def __post_init__(self) -> None:
        if self.family not in get_args(Family):
            raise ConfigError(f"rope family {self.family!r} is not one of {', '.join(get_args(Family))}")
        if self.scaling_dtype not in get_args(ScalingDtype):
            raise ConfigError(
                f"rope scaling dtype {self.scaling_dtype!r} is not one of {', '.join(get_args(ScalingDtype))}"
            )
        if not self.freqs_scaling > 0:
            raise ConfigError(f"rope freqs_scaling is {self.freqs_scaling}; it must be positive")


@dataclass(frozen=True)
class FusionConfig:
    """Architecture of the fusion transformer; the defaults are the published 11.66 B parameters.

    Attributes:
        dim: width D of both residual streams.
        ffn_dim: hidden width of both feed-forward layers.
        freq_dim: width of the sinusoidal timestep features.
        num_heads: attention heads N; the head dimension is ``dim / num_heads``.
        num_layers: blocks, each with a video and an audio half.
        text_dim: width of the text encoder's states.
        text_len: number of tokens to which texts are zero-padded.
        eps: of every norm.
        patch_size: video latent voxels (frames, rows, columns) in one token.
        video_channels: channels of video latents and flows.
        audio_channels: channels of audio latents and flows.
        audio_kernel: taps of the audio adapter's convolutions, odd.
        rope: rotary positions.
    """

    dim: int = 3072
    ffn_dim: int = 14336
    freq_dim: int = 256
    num_heads: int = 24
    num_layers: int = 30
    text_dim: int = DEFAULT_TEXT_DIM
    text_len: int = 512
    eps: float = 1e-6
    patch_size: tuple[int, int, int] = (1, 2, 2)
    video_channels: int = 48
    audio_channels: int = 20
    audio_kernel: int = 7
    rope: RopeConfig = field(default_factory=RopeConfig)

    def __post_init__(self) -> None:
        if self.dim % self.num_heads or self.head_dim % 2:
            raise ConfigError(f"dim {self.dim} does not divide into {self.num_heads} heads of an even width")
        if self.audio_kernel % 2 == 0:
            raise ConfigError(f"audio_kernel is {self.audio_kernel}; it must be odd")

    @property
    def head_dim(self) -> int:
        """Width H of one attention head."""
        return self.dim // self.num_heads

    @property
    def patch_dim(self) -> int:
        """Number of latent values in one video token: channels times voxels of a patch."""
        frames, rows, columns = self.patch_size
        return self.video_channels * frames * rows * columns

    @property
    def gated_conv_dim(self) -> int:
        """Hidden width of the audio adapter's gated convolution: 8/3 of ``dim``, rounded up."""
        hidden = 2 * (4 * self.dim) // 3
        return -(-hidden // GATED_CONV_MULTIPLE) * GATED_CONV_MULTIPLE

    @property
    def sizes(self) -> dict[str, int]:
        """Named sizes for the expressions of a remap rule set."""
        return {
            "dim": self.dim,
            "patch_dim": self.patch_dim,
            "gated_conv_dim": self.gated_conv_dim,
            "audio_channels": self.audio_channels,
            "audio_kernel": self.audio_kernel,
        }

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> FusionConfig:
        """Read the JSON of both towers and the ``rope`` section.

        Raises:
            ConfigError: a section or field is missing, the towers disagree, or an option has an unsupported value.
        """
        for section in ("video", "audio", "rope"):
            if section not in config:
                raise ConfigError(
                    f"the transformer's config has no {section!r} section",
                    hint="add the original's video and audio JSON under these names, and a rope section",
                )
        video, audio = config["video"], config["audio"]
        shared = {name: _agreed(video, audio, name) for name in SHARED_FIELDS}
        for tower, values in (("video", video), ("audio", audio)):
            _check_tower(tower, values)
        return cls(
            **shared,
            patch_size=tuple(_field("video", video, "patch_size")),
            video_channels=_field("video", video, "in_dim"),
            audio_channels=_field("audio", audio, "in_dim"),
            rope=_read_rope(config["rope"], audio),
        )


def _read_rope(rope: Mapping[str, Any], audio: Mapping[str, Any]) -> RopeConfig:
    """Read a rope section; Ovi's factor is in the audio tower's JSON and is not rounded."""
    family = rope.get("family", "")
    if family == "ovi":
        return RopeConfig("ovi", float(_field("audio", audio, "temporal_rope_scaling_factor")), "float64")
    scaling = rope.get("freqs_scaling")
    if not isinstance(scaling, Mapping) or not {"num", "den", "dtype"} <= scaling.keys():
        raise ConfigError(
            f"rope family {family!r} needs freqs_scaling with num, den and dtype, got {scaling!r}",
            hint='for DreamID-Omni: {"num": 31, "den": 157, "dtype": "bfloat16"}',
        )
    return RopeConfig(family, scaling["num"] / scaling["den"], scaling["dtype"])


def _agreed(video: Mapping[str, Any], audio: Mapping[str, Any], name: str) -> Any:
    ours, theirs = _field("video", video, name), _field("audio", audio, name)
    if ours != theirs:
        raise ConfigError(
            f"{name} is {ours} in the video tower and {theirs} in the audio tower; they must be equal",
            hint="give both towers the same width, heads, layers and text sizes",
        )
    return ours


def _check_tower(tower: str, values: Mapping[str, Any]) -> None:
    for name, required in REQUIRED_VALUES.items():
        given = values.get(name, required)
        if (list(given) if isinstance(given, (list, tuple)) else given) != required:
            raise ConfigError(f"{tower}.{name} is {given}; only {required} is supported")
    if values.get("out_dim", values.get("in_dim")) != values.get("in_dim"):
        raise ConfigError(f"{tower}.out_dim {values['out_dim']} differs from in_dim {values['in_dim']}")


def _field(tower: str, values: Mapping[str, Any], name: str) -> Any:
    if name == "text_dim":
        return values.get(name, DEFAULT_TEXT_DIM)
    if name not in values:
        raise ConfigError(f"the {tower} tower's config has no {name!r}")
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
