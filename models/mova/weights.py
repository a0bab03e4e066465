r"""Components of MOVA, and rules from the published files to their modules.

The towers have the names of Wan's own repository (:mod:`port_kit.models.wan.weights.transformer_rules`). Text encoder
and video VAE were written by the libraries that read them here, so their names stay.
"""

from __future__ import annotations

from collections.abc import Iterator

from port_kit.models.wan.weights.transformer_rules import AUDIO_TOWER, VIDEO_TOWER
from port_kit.port import Component
from port_kit.remap import Op, Rule, RuleSet

_MODEL, _WAN = "port_kit.models.mova.model", "port_kit.models.wan.components"
_RULES, _CONFIGS = "port_kit.models.mova.weights", "port_kit.models.mova.config"


def _component(name: str, build: str, *, kind: str = "transformer", rules: str = "", config: str = "") -> Component:
    """Return a component whose rules and full-size configuration have its name, unless they are given."""
    return Component(
        name=name,
        build=build,
        rules=f"{_RULES}:{rules or name.upper()}",
        config=f"{_CONFIGS}:{config or name.upper()}_CONFIG",
        kind=kind,
    )


#: In loading order. The video towers of high and of low noise share the audio tower and the bridge.
COMPONENTS = (
    _component("transformer", f"{_MODEL}.transformer:build_transformer"),
    _component("transformer_2", f"{_MODEL}.transformer:build_transformer_2", rules="TRANSFORMER", config="TRANSFORMER"),
    _component("audio_transformer", f"{_MODEL}.transformer:build_audio_transformer", kind="partner"),
    _component("bridge", f"{_MODEL}.bridge:build_bridge", kind="partner"),
    _component("text_encoder", f"{_WAN}.text_encoder:build_text_encoder", kind="encoder"),
    _component("vae", f"{_WAN}.video_vae:build_video_vae", kind="vae"),
    _component("audio_vae", f"{_MODEL}.audio_vae:build_audio_vae", kind="vae"),
)

_DIRECTION = r"(audio_to_video|video_to_audio)_conditioners\.(\d+)"
_PLACE = r"layers.\2.\1"

TRANSFORMER = VIDEO_TOWER
AUDIO_TRANSFORMER = AUDIO_TOWER

BRIDGE = RuleSet(
    name="mova_bridge",
    rules=(
        Rule(rf"{_DIRECTION}\.y_norm\.(\w+)", rf"{_PLACE}.norm.\3"),
        Rule(rf"{_DIRECTION}\.inner\.k\.(\w+)", rf"{_PLACE}.kv.\3", shard="0"),
        Rule(rf"{_DIRECTION}\.inner\.v\.(\w+)", rf"{_PLACE}.kv.\3", shard="1"),
        Rule(rf"{_DIRECTION}\.inner\.(q|o|norm_q|norm_k)\.(\w+)", rf"{_PLACE}.\3.\4"),
    ),
)

TEXT_ENCODER = RuleSet(
    name="umt5_encoder_of_transformers",
    rules=(
        Rule(r"shared\.weight", "shared.weight"),
        # a second name of the table that some files have
        Rule(r"encoder\.embed_tokens\.weight", drop="the same table as shared.weight", optional=True),
        Rule(r"encoder\.(block|final_layer_norm)\.(.+)", r"encoder.\1.\2"),
    ),
)

VAE = RuleSet(
    name="wan_vae_of_diffusers",
    allow_downcast=True,
    rules=(Rule(r"(encoder|decoder|quant_conv|post_quant_conv)\.(.+)", r"\1.\2"),),
)

#: Convolutions of the audio decoder: the first and the last one of ``decoder.model`` have no ``block``.
_STAGE = r"decoder\.model\.(\d+)\.block"
_CONVOLUTIONS = (
    (r"post_quant_conv", "post_quant"),
    (r"decoder\.model\.0", "input"),
    (rf"{_STAGE}\.1", r"stages.{\1 - 1}.upsample"),
    (rf"{_STAGE}\.([2-4])\.block\.1", r"stages.{\1 - 1}.units.{\2 - 2}.dilated"),
    (rf"{_STAGE}\.([2-4])\.block\.3", r"stages.{\1 - 1}.units.{\2 - 2}.pointwise"),
    (r"decoder\.model\.[1-9]\d*", "output"),
)
_ACTIVATIONS = (
    (rf"{_STAGE}\.0", r"stages.{\1 - 1}.activation"),
    (rf"{_STAGE}\.([2-4])\.block\.0", r"stages.{\1 - 1}.units.{\2 - 2}.activations.0"),
    (rf"{_STAGE}\.([2-4])\.block\.2", r"stages.{\1 - 1}.units.{\2 - 2}.activations.1"),
    (r"decoder\.model\.[1-9]\d*", "activation"),
)


def _audio_vae_rules() -> Iterator[Rule]:
    """Yield the rules of the decoder; weights may be plain, or direction and magnitude."""
    fold = (Op.of("weight_norm", dim=0),)
    yield Rule(r"(encoder|quant_conv)\..+", drop="the pipeline encodes no audio")
    for source, target in _CONVOLUTIONS:
        yield Rule(rf"{source}\.bias", f"{target}.bias")
        is_normed = target != "post_quant"
        yield Rule(rf"{source}\.weight", f"{target}.weight", variant="weight_norm:folded" if is_normed else "")
        for role in ("g", "v") if is_normed else ():
            yield Rule(rf"{source}\.weight_{role}", f"{target}.weight", shard=role, op=fold, variant="weight_norm:g_v")
    for source, target in _ACTIVATIONS:
        yield Rule(rf"{source}\.alpha", f"{target}.alpha")


AUDIO_VAE = RuleSet(name="mova_audio_vae", allow_downcast=True, rules=tuple(_audio_vae_rules()))
