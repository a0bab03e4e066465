r"""Rules from the original fusion checkpoint to :class:`~port_kit.models.wan.transformer.model.WanFusionTransformer`.

DreamID-Omni and Ovi publish the same names. A source name starts with its tower, ``video_model.`` or
``audio_model.``; layer i of both towers becomes the two halves of block i. Projections of one input are fused.
Convolutions become linears over unfolded windows: the channels and taps of a weight are flattened in their order.
"""

from __future__ import annotations

from port_kit.remap import Op, Rule, RuleSet

_TOWER = r"(video|audio)_model"
_BLOCK = rf"{_TOWER}\.blocks\.(\d+)"
_FLAT_TAPS = Op.of("rearrange", pattern="o i k -> o (i k)")
_FLAT_PATCH = Op.of("rearrange", pattern="o c f h w -> o (c f h w)")

TRANSFORMER = RuleSet(
    name="wan_transformer",
    allow_downcast=True,  # DreamID-Omni publishes float32 and runs it in bfloat16
    rules=(
        # modality adapters
        Rule(r"video_model\.patch_embedding\.weight", r"video.patch_embedding.proj.weight", op=(_FLAT_PATCH,)),
        Rule(r"video_model\.patch_embedding\.bias", r"video.patch_embedding.proj.bias"),
        Rule(r"audio_model\.patch_embedding\.0\.weight", r"audio.patch_embedding.proj.weight", op=(_FLAT_TAPS,)),
        Rule(r"audio_model\.patch_embedding\.0\.bias", r"audio.patch_embedding.proj.bias"),
        Rule(
            r"audio_model\.patch_embedding\.2\.w1\.weight",
            r"audio.patch_embedding.gated.gate_up.weight",
            shard="0",
            op=(_FLAT_TAPS,),
        ),
        Rule(
            r"audio_model\.patch_embedding\.2\.w3\.weight",
            r"audio.patch_embedding.gated.gate_up.weight",
            shard="1",
            op=(_FLAT_TAPS,),
        ),
        Rule(
            r"audio_model\.patch_embedding\.2\.w2\.weight",
            r"audio.patch_embedding.gated.down.weight",
            op=(_FLAT_TAPS,),
        ),
        Rule(rf"{_TOWER}\.(text|time)_embedding\.0\.(\w+)", r"\1.\2_embedding.up.\3"),
        Rule(rf"{_TOWER}\.(text|time)_embedding\.2\.(\w+)", r"\1.\2_embedding.down.\3"),
        Rule(rf"{_TOWER}\.time_projection\.1\.(\w+)", r"\1.time_projection.linear.\2"),
        Rule(rf"{_TOWER}\.head\.modulation", r"\1.head.modulation"),
        Rule(rf"{_TOWER}\.head\.head\.(\w+)", r"\1.head.proj.\2"),
        # blocks: modulation and self-attention
        Rule(rf"{_BLOCK}\.modulation\.modulation", r"blocks.\2.\1.modulation"),
        Rule(rf"{_BLOCK}\.self_attn\.(q|k|v)\.(\w+)", r"blocks.\2.\1.self_attn.qkv.\4", shard=r"\3"),
        Rule(rf"{_BLOCK}\.self_attn\.(o|norm_q|norm_k)\.(\w+)", r"blocks.\2.\1.self_attn.\3.\4"),
        # blocks: attention to the text and to the other stream
        Rule(rf"{_BLOCK}\.norm3\.(\w+)", r"blocks.\2.\1.cross_attn.norm.\3"),
        Rule(rf"{_BLOCK}\.cross_attn\.k(|_fusion)\.(\w+)", r"blocks.\2.\1.cross_attn.kv\3.\4", shard="0"),
        Rule(rf"{_BLOCK}\.cross_attn\.v(|_fusion)\.(\w+)", r"blocks.\2.\1.cross_attn.kv\3.\4", shard="1"),
        Rule(
            rf"{_BLOCK}\.cross_attn\.(q|o|norm_q|norm_k|norm_k_fusion|pre_attn_norm_fusion)\.(\w+)",
            r"blocks.\2.\1.cross_attn.\3.\4",
        ),
        # blocks: feed-forward
        Rule(rf"{_BLOCK}\.ffn\.0\.(\w+)", r"blocks.\2.\1.ffn.up.\3"),
        Rule(rf"{_BLOCK}\.ffn\.2\.(\w+)", r"blocks.\2.\1.ffn.down.\3"),
    ),
)
