"""Names of a Wan tower's modules in LoRAs that were trained on Wan itself.

The video tower of the fusion transformer has the modules and shapes of Wan2.2-TI2V-5B: width 3072, feed-forward 14336,
30 layers, texts of 4096. Its cross-attention to the audio stream has no other name. The audio tower has none either.
"""

from __future__ import annotations

_BLOCK = r"(blocks\.\d+)"

#: Module of a tower in Wan's own names, and its name in diffusers.
DIFFUSERS_NAMES: tuple[tuple[str, str], ...] = (
    (rf"{_BLOCK}\.self_attn\.(q|k|v)", r"\1.attn1.to_\2"),
    (rf"{_BLOCK}\.self_attn\.o", r"\1.attn1.to_out.0"),
    (rf"{_BLOCK}\.self_attn\.(norm_[qk])", r"\1.attn1.\2"),
    (rf"{_BLOCK}\.cross_attn\.(q|k|v)", r"\1.attn2.to_\2"),
    (rf"{_BLOCK}\.cross_attn\.o", r"\1.attn2.to_out.0"),
    (rf"{_BLOCK}\.cross_attn\.(norm_[qk])", r"\1.attn2.\2"),
    (rf"{_BLOCK}\.norm3", r"\1.norm2"),
    (rf"{_BLOCK}\.ffn\.0", r"\1.ffn.net.0.proj"),
    (rf"{_BLOCK}\.ffn\.2", r"\1.ffn.net.2"),
    (r"text_embedding\.0", "condition_embedder.text_embedder.linear_1"),
    (r"text_embedding\.2", "condition_embedder.text_embedder.linear_2"),
    (r"time_embedding\.0", "condition_embedder.time_embedder.linear_1"),
    (r"time_embedding\.2", "condition_embedder.time_embedder.linear_2"),
    (r"time_projection\.1", "condition_embedder.time_proj"),
    (r"head\.head", "proj_out"),
)

_VIDEO = r"video_model\."
#: Module of the fusion checkpoint, and its name in LoRA files: first Wan's own repository, then diffusers.
WAN_NAMES: tuple[tuple[str, str], ...] = (
    (rf"{_VIDEO}{_BLOCK}\.(self_attn|cross_attn)\.(q|k|v|o|norm_q|norm_k)", r"\1.\2.\3"),
    (rf"{_VIDEO}{_BLOCK}\.(norm3|ffn\.0|ffn\.2)", r"\1.\2"),
    (rf"{_VIDEO}(patch_embedding|text_embedding\.[02]|time_embedding\.[02]|time_projection\.1|head\.head)", r"\1"),
    *((f"{_VIDEO}{pattern}", name) for pattern, name in DIFFUSERS_NAMES),
)
