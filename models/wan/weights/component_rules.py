r"""Rules from the original component checkpoints to the components of DreamID-Omni and Ovi.

===============  ====================================  ==================================================
rule set         file                                  target
===============  ====================================  ==================================================
TEXT_ENCODER     models_t5_umt5-xxl-enc-bf16.pth       transformers' ``UMT5EncoderModel``
VAE              Wan2.2_VAE.pth                        diffusers' ``AutoencoderKLWan``
AUDIO_VAE        v1-16.pth                             :class:`~port_kit.models.wan.components.audio_vae.AudioVAE`
VOCODER          best_netG.pt, key ``generator``       :class:`~port_kit.models.wan.components.vocoder.Vocoder`
===============  ====================================  ==================================================

Two rule sets change values: filters of the audio VAE are scaled to unit norm, and weight normalization of the vocoder
is folded. Their targets have other names than their sources, so that a converted checkpoint is not converted again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from port_kit.remap import Op, Rule, RuleSet, transform

if TYPE_CHECKING:
    from torch import Tensor

_Shapes = Mapping[str, tuple[int, ...]]

# -- umt5-xxl --------------------------------------------------------------------------------------------------------

_T5_LAYER = r"blocks\.(\d+)"
_HF_LAYER = r"encoder.block.\1.layer"

TEXT_ENCODER = RuleSet(
    name="umt5_encoder",
    rules=(
        # transformers has two names for this tensor, `shared` and `encoder.embed_tokens`; it is written once
        Rule(r"token_embedding\.weight", "shared.weight"),
        Rule(rf"{_T5_LAYER}\.attn\.(q|k|v|o)\.weight", rf"{_HF_LAYER}.0.SelfAttention.\2.weight"),
        # UMT5 has relative positions in every layer; T5 shares those of the first layer
        Rule(
            rf"{_T5_LAYER}\.pos_embedding\.embedding\.weight",
            rf"{_HF_LAYER}.0.SelfAttention.relative_attention_bias.weight",
        ),
        Rule(rf"{_T5_LAYER}\.norm1\.weight", rf"{_HF_LAYER}.0.layer_norm.weight"),
        Rule(rf"{_T5_LAYER}\.norm2\.weight", rf"{_HF_LAYER}.1.layer_norm.weight"),
        Rule(rf"{_T5_LAYER}\.ffn\.gate\.0\.weight", rf"{_HF_LAYER}.1.DenseReluDense.wi_0.weight"),
        Rule(rf"{_T5_LAYER}\.ffn\.fc1\.weight", rf"{_HF_LAYER}.1.DenseReluDense.wi_1.weight"),
        Rule(rf"{_T5_LAYER}\.ffn\.fc2\.weight", rf"{_HF_LAYER}.1.DenseReluDense.wo.weight"),
        Rule(r"norm\.weight", "encoder.final_layer_norm.weight"),
    ),
)

# -- Wan 2.2 VAE -----------------------------------------------------------------------------------------------------

#: Paths of residual blocks: ``(source, target)``, each with two groups.
_RESIDUAL_BLOCKS = (
    (r"encoder\.downsamples\.(\d+)\.downsamples\.(\d+)", r"encoder.down_blocks.\1.resnets.\2"),
    (r"decoder\.upsamples\.(\d+)\.upsamples\.(\d+)", r"decoder.up_blocks.\1.resnets.\2"),
    (r"(encoder|decoder)\.middle\.(0|2)", r"\1.mid_block.resnets.{\2 // 2}"),
)
#: Layers of a residual block. The original numbers them within a ``Sequential`` that includes SiLU and dropout.
_RESIDUAL_LAYERS = (
    (r"residual\.0", "norm1"),
    (r"residual\.2", "conv1"),
    (r"residual\.3", "norm2"),
    (r"residual\.6", "conv2"),
    (r"shortcut", "conv_shortcut"),
)


def _residual_rules() -> Iterator[Rule]:
    """Yield the rules of residual blocks; only blocks that change the width have a shortcut."""
    for place, target in _RESIDUAL_BLOCKS:
        for layer, name in _RESIDUAL_LAYERS:
            yield Rule(
                rf"{place}\.{layer}\.(gamma|weight|bias)", rf"{target}.{name}.\3", optional=name == "conv_shortcut"
            )


VAE = RuleSet(
    name="wan_2_2_vae",
    rules=(
        *_residual_rules(),
        Rule(
            r"encoder\.downsamples\.(\d+)\.downsamples\.\d+\.(resample\.1|time_conv)\.(weight|bias)",
            r"encoder.down_blocks.\1.downsampler.\2.\3",
        ),
        Rule(
            r"decoder\.upsamples\.(\d+)\.upsamples\.\d+\.(resample\.1|time_conv)\.(weight|bias)",
            r"decoder.up_blocks.\1.upsampler.\2.\3",
        ),
        Rule(
            r"(encoder|decoder)\.middle\.1\.(norm|to_qkv|proj)\.(gamma|weight|bias)",
            r"\1.mid_block.attentions.0.\2.\3",
        ),
        Rule(r"(encoder|decoder)\.conv1\.(weight|bias)", r"\1.conv_in.\2"),
        Rule(r"(encoder|decoder)\.head\.0\.gamma", r"\1.norm_out.gamma"),
        Rule(r"(encoder|decoder)\.head\.2\.(weight|bias)", r"\1.conv_out.\2"),
        Rule(r"conv1\.(weight|bias)", r"quant_conv.\1"),
        Rule(r"conv2\.(weight|bias)", r"post_quant_conv.\1"),
    ),
)

# -- MMAudio VAE -----------------------------------------------------------------------------------------------------

_RMS_GUARD = 1e-4


def _restore_filters(weight: Tensor, args: Mapping[str, Any], shapes: _Shapes) -> dict[str, Tensor]:
    """Return raw filters that :func:`unit_filters` converts to ``weight``.

    The RMS of a unit filter is ``r / (guard + r)`` for a raw filter of RMS ``r``; this solves for ``r``. The quotient
    is nearly 1 and amplifies rounding of ``r``, but directions and the result of :func:`unit_filters` are exact.
    """
    import torch

    size = math.prod(weight.shape[1:])
    scaled = weight.double() * math.sqrt(size)
    quotient = torch.linalg.vector_norm(scaled, dim=(1, 2), keepdim=True) / math.sqrt(size)
    raw_rms = _RMS_GUARD * quotient / (1.0 - quotient).clamp(min=torch.finfo(torch.float32).eps)
    return {"": (scaled * (raw_rms / quotient)).to(weight.dtype)}


@transform("unit_filters", shape=lambda shapes, args: shapes[""], inverse=_restore_filters)
def unit_filters(parts: Mapping[str, Tensor], args: Mapping[str, Any]) -> Tensor:
    """Scale each output filter of a raw weight ``[out, in, taps]`` to unit norm, in float32.

    The original divides by ``1e-4 + rms`` and by the root of the filter's size. The constant matters for the result:
    it makes filters of small raw norm slightly shorter than 1.
    """
    import torch

    weight = parts[""].to(torch.float32)
    root = math.sqrt(weight[0].numel())
    norm = torch.linalg.vector_norm(weight, dim=(1, 2), keepdim=True)
    return weight / (norm / root + _RMS_GUARD) / root


_UNIT = (Op.of("unit_filters"),)
_HALF = r"(encoder|decoder)"

AUDIO_VAE = RuleSet(
    name="mmaudio_vae_16k",
    allow_downcast=True,
    rules=(
        Rule(r"data_(mean|std)", r"data_\1"),
        Rule(rf"{_HALF}\.learnable_gain", r"\1.gain"),
        Rule(rf"{_HALF}\.conv_in\.weight", r"\1.input.weight", op=_UNIT),
        Rule(rf"{_HALF}\.conv_out\.weight", r"\1.output.weight", op=_UNIT),
        # the middle is a sequence of block, attention, block
        Rule(rf"{_HALF}\.mid\.block_(1|2)\.(conv[12])\.weight", r"\1.middle.{2 * \2 - 2}.\3.weight", op=_UNIT),
        Rule(rf"{_HALF}\.mid\.attn_1\.qkv\.weight", r"\1.middle.1.qkv.weight", op=_UNIT),
        Rule(rf"{_HALF}\.mid\.attn_1\.proj_out\.weight", r"\1.middle.1.output.weight", op=_UNIT),
        Rule(rf"{_HALF}\.(?:down|up)\.(\d+)\.block\.(\d+)\.(conv[12])\.weight", r"\1.stages.\2.\3.\4.weight", op=_UNIT),
        Rule(
            rf"{_HALF}\.(?:down|up)\.(\d+)\.block\.(\d+)\.nin_shortcut\.weight",
            r"\1.stages.\2.\3.shortcut.weight",
            op=_UNIT,
        ),
        Rule(r"encoder\.down\.\d+\.downsample\.conv1\.weight", "encoder.downsample.before.weight", op=_UNIT),
        Rule(r"encoder\.down\.\d+\.downsample\.conv2\.weight", "encoder.downsample.after.weight", op=_UNIT),
        Rule(r"decoder\.up\.\d+\.upsample\.conv\.weight", "decoder.upsample.conv.weight", op=_UNIT),
    ),
)

# -- BigVGAN ---------------------------------------------------------------------------------------------------------

_VOCODER_CONVS = (
    (r"conv_pre", "input"),
    (r"ups\.(\d+)\.0", r"upsamplers.\1"),
    (r"resblocks\.(\d+)\.convs1\.(\d+)", r"blocks.\1.dilated.\2"),
    (r"resblocks\.(\d+)\.convs2\.(\d+)", r"blocks.\1.plain.\2"),
    (r"conv_post", "output"),
)
_VOCODER_ACTIVATIONS = (
    (r"resblocks\.(\d+)\.activations\.(\d+)", r"blocks.\1.activations.\2"),
    (r"activation_post", "activation"),
)
#: Torch's names of magnitude and direction, before and since ``torch.nn.utils.parametrizations``.
_WEIGHT_NORM_SPELLINGS = {
    "g_v": {"g": "weight_g", "v": "weight_v"},
    "parametrized": {"g": r"parametrizations\.weight\.original0", "v": r"parametrizations\.weight\.original1"},
}


def _convolution_rules() -> Iterator[Rule]:
    """Yield the rules of biases (the last convolution may have none) and of weights in either spelling."""
    fold = (Op.of("weight_norm", dim=0),)
    for source, target in _VOCODER_CONVS:
        yield Rule(rf"{source}\.bias", f"{target}.bias", optional=target == "output")
        for spelling, names in _WEIGHT_NORM_SPELLINGS.items():
            for role, name in names.items():
                yield Rule(
                    rf"{source}\.{name}",
                    f"{target}.weight",
                    shard=role,
                    op=fold,
                    variant=f"weight_norm:{spelling}",
                )


def _activation_rules() -> Iterator[Rule]:
    for source, target in _VOCODER_ACTIVATIONS:
        last = "3" if r"\2" in target else "1"
        yield Rule(rf"{source}\.act\.(alpha|beta)", rf"{target}.\{last}")
        yield Rule(rf"{source}\.upsample\.filter", f"{target}.upsample_filter")
        yield Rule(rf"{source}\.downsample\.lowpass\.filter", f"{target}.downsample_filter")


VOCODER = RuleSet(name="bigvgan_16k", allow_downcast=True, rules=(*_convolution_rules(), *_activation_rules()))
