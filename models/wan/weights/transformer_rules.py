r"""Rules from original checkpoints to fusion transformers and to towers alone.

DreamID-Omni and Ovi publish the same names. A source name starts with its tower, ``video_model.`` or
``audio_model.``; layer i of both towers becomes the two halves of block i. A tower alone has the names of Wan's own
repository. Projections of one input are fused. Convolutions become linears over unfolded windows: the channels and taps
of a weight are flattened in their order.
"""

from __future__ import annotations

from port_kit.remap import Op, Rule, RuleSet

_FLAT_TAPS = Op.of("rearrange", pattern="o i k -> o (i k)")
_FLAT_PATCH = Op.of("rearrange", pattern="o c f h w -> o (c f h w)")


def _patch_rules(source: str, target: str, flat: Op) -> tuple[Rule, ...]:
    """Return the rules of a convolution that embeds patches."""
    return (
        Rule(rf"{source}patch_embedding\.weight", f"{target}patch_embedding.proj.weight", op=(flat,)),
        Rule(rf"{source}patch_embedding\.bias", f"{target}patch_embedding.proj.bias"),
    )


def _tower_rules(tower: str, target: str, half: str, modulation: str) -> tuple[Rule, ...]:
    r"""Return the rules of a tower without its patch embedding.

    Args:
        tower: pattern of the prefix of the tower's names, with one group.
        target: prefix of its adapter's target names; ``\1`` is the group of ``tower``.
        half: path of a layer of the tower within its block; ``\1`` is the group of ``tower``.
        modulation: pattern of the name of a block's modulation.
    """
    layer, block = rf"{tower}blocks\.(\d+)", rf"blocks.\2.{half}"
    return (
        # modality adapter
        Rule(rf"{tower}(text|time)_embedding\.0\.(\w+)", rf"{target}\2_embedding.up.\3"),
        Rule(rf"{tower}(text|time)_embedding\.2\.(\w+)", rf"{target}\2_embedding.down.\3"),
        Rule(rf"{tower}time_projection\.1\.(\w+)", rf"{target}time_projection.linear.\2"),
        Rule(rf"{tower}head\.modulation", rf"{target}head.modulation"),
        Rule(rf"{tower}head\.head\.(\w+)", rf"{target}head.proj.\2"),
        # blocks: modulation and self-attention
        Rule(rf"{layer}\.{modulation}", rf"{block}modulation"),
        Rule(rf"{layer}\.self_attn\.(q|k|v)\.(\w+)", rf"{block}self_attn.qkv.\4", shard=r"\3"),
        Rule(rf"{layer}\.self_attn\.(o|norm_q|norm_k)\.(\w+)", rf"{block}self_attn.\3.\4"),
        # blocks: attention to the text, and to the other stream if there is one
        Rule(rf"{layer}\.norm3\.(\w+)", rf"{block}cross_attn.norm.\3"),
        Rule(rf"{layer}\.cross_attn\.k(|_fusion)\.(\w+)", rf"{block}cross_attn.kv\3.\4", shard="0"),
        Rule(rf"{layer}\.cross_attn\.v(|_fusion)\.(\w+)", rf"{block}cross_attn.kv\3.\4", shard="1"),
        Rule(
            rf"{layer}\.cross_attn\.(q|o|norm_q|norm_k|norm_k_fusion|pre_attn_norm_fusion)\.(\w+)",
            rf"{block}cross_attn.\3.\4",
        ),
        # blocks: feed-forward
        Rule(rf"{layer}\.ffn\.0\.(\w+)", rf"{block}ffn.up.\3"),
        Rule(rf"{layer}\.ffn\.2\.(\w+)", rf"{block}ffn.down.\3"),
    )


#: To :class:`~port_kit.models.wan.transformer.model.WanFusionTransformer`.
TRANSFORMER = RuleSet(
    name="wan_transformer",
    allow_downcast=True,  # DreamID-Omni publishes float32 and runs it in bfloat16
    rules=(
        *_patch_rules(r"video_model\.", "video.", _FLAT_PATCH),
        Rule(r"audio_model\.patch_embedding\.0\.weight", r"audio.patch_embedding.proj.weight", op=(_FLAT_TAPS,)),
        Rule(r"audio_model\.patch_embedding\.0\.bias", r"audio.patch_embedding.proj.bias"),
        *(
            Rule(
                rf"audio_model\.patch_embedding\.2\.{source}\.weight",
                rf"audio.patch_embedding.gated.{target}.weight",
                shard=shard,
                op=(_FLAT_TAPS,),
            )
            for source, target, shard in (("w1", "gate_up", "0"), ("w3", "gate_up", "1"), ("w2", "down", ""))
        ),
        *_tower_rules(r"(video|audio)_model\.", r"\1.", r"\1.", r"modulation\.modulation"),
    ),
)

_WAN_TOWER = _tower_rules("()", "", "", "modulation")
#: To :class:`~port_kit.models.wan.transformer.tower.WanTower`.
VIDEO_TOWER = RuleSet(name="wan_video_tower", rules=(*_patch_rules("", "", _FLAT_PATCH), *_WAN_TOWER))
AUDIO_TOWER = RuleSet(name="wan_audio_tower", rules=(*_patch_rules("", "", _FLAT_TAPS), *_WAN_TOWER))
