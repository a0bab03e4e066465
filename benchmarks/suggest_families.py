"""True conversions of further model families, derived on the meta device, to measure ``suggest`` on.

A family is a small real model (its names and shapes are the target) and the original's naming, written as ordered
substitutions on target names. Marks in a substituted name say what the conversion does besides renaming:

* ``@k``: the tensor is the k-th part of a fused source (rows in order of k);
* ``~swap``: its two halves change places; ``~T``: it is transposed; ``~11``: the source is a 1x1 convolution.

Where diffusers ships the conversion, :func:`check` runs it on tensors of unique numbers and demands that the written
truth gives the same tensors.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Shape = tuple[int, ...]
Subs = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Family:
    """One conversion.

    Attributes:
        name: family.
        build: makes the target module (called under the meta device).
        subs: regular expression -> replacement, applied in order to every target name.
        prefix: put before every source name.
        function: name of the conversion in diffusers' ``single_file_utils``, where there is one.
        extra: sources that the conversion drops, with their shapes.
    """

    name: str
    build: Callable[[], Any]
    subs: Subs
    prefix: str = ""
    function: str = ""
    extra: Mapping[str, Shape] = field(default_factory=dict)


def _diffusers(name: str, **config: Any) -> Callable[[], Any]:
    def build() -> Any:
        import diffusers

        return getattr(diffusers, name)(**config)

    return build


def _transformers(name: str, config_name: str, **config: Any) -> Callable[[], Any]:
    def build() -> Any:
        import transformers

        return getattr(transformers, name)(getattr(transformers, config_name)(**config))

    return build


_LUMINA2: Subs = (
    (r"time_caption_embed\.caption_embedder", "cap_embedder"),
    (r"time_caption_embed\.timestep_embedder\.linear_1", "t_embedder.mlp.0"),
    (r"time_caption_embed\.timestep_embedder\.linear_2", "t_embedder.mlp.2"),
    (r"norm_out\.linear_1", "final_layer.adaLN_modulation.1"),
    (r"norm_out\.linear_2", "final_layer.linear"),
    (r"norm1\.linear", "adaLN_modulation.1"),
    (r"norm1\.norm", "attention_norm1"),
    (r"(context_refiner\.\d+)\.norm1", r"\1.attention_norm1"),
    (r"\.norm2", ".attention_norm2"),
    (r"attn\.to_q\.", "attention.qkv@0."),
    (r"attn\.to_k\.", "attention.qkv@1."),
    (r"attn\.to_v\.", "attention.qkv@2."),
    (r"attn\.to_out\.0", "attention.out"),
    (r"attn\.norm_q", "attention.q_norm"),
    (r"attn\.norm_k", "attention.k_norm"),
    (r"feed_forward\.linear_(\d)", r"feed_forward.w\1"),
)
_AURAFLOW: Subs = (
    (r"time_step_proj\.linear_1", "t_embedder.mlp.0"),
    (r"time_step_proj\.linear_2", "t_embedder.mlp.2"),
    (r"context_embedder", "cond_seq_linear"),
    (r"^joint_transformer_blocks", "double_layers"),
    (r"^single_transformer_blocks", "single_layers"),
    (r"(single_layers\.\d+)\.ff\.", r"\1.mlp."),
    (r"\.ff\.", ".mlpX."),
    (r"\.ff_context\.", ".mlpC."),
    (r"\.linear_1\.weight", ".c_fc1.weight"),
    (r"\.linear_2\.weight", ".c_fc2.weight"),
    (r"out_projection", "c_proj"),
    (r"(double_layers\.\d+)\.norm1\.linear", r"\1.modX.1"),
    (r"norm1_context\.linear", "modC.1"),
    (r"(single_layers\.\d+)\.norm1\.linear", r"\1.modCX.1"),
    (r"(single_layers.*)to_([qkv])", r"\1w1\2"),
    (r"(single_layers.*)to_out\.0", r"\1w1o"),
    (r"to_([qkv])\b", r"w2\1"),
    (r"to_out\.0", "w2o"),
    (r"add_([qkv])_proj", r"w1\1"),
    (r"to_add_out", "w1o"),
    (r"norm_out\.linear", "modF.1~swap"),
    (r"^proj_out", "final_linear"),
    (r"pos_embed\.pos_embed", "positional_encoding"),
    (r"pos_embed\.proj", "init_x_linear"),
)
_SANA: Subs = (
    (r"^patch_embed", "x_embedder"),
    (r"time_embed\.emb\.timestep_embedder\.linear_1", "t_embedder.mlp.0"),
    (r"time_embed\.emb\.timestep_embedder\.linear_2", "t_embedder.mlp.2"),
    (r"time_embed\.linear", "t_block.1"),
    (r"caption_projection\.linear_", "y_embedder.y_proj.fc"),
    (r"caption_norm", "attention_y_norm"),
    (r"^transformer_blocks", "blocks"),
    (r"attn1\.to_q", "attn.qkv@0"),
    (r"attn1\.to_k", "attn.qkv@1"),
    (r"attn1\.to_v", "attn.qkv@2"),
    (r"attn1\.to_out\.0", "attn.proj"),
    (r"attn2\.to_q", "cross_attn.q_linear"),
    (r"attn2\.to_k", "cross_attn.kv_linear@0"),
    (r"attn2\.to_v", "cross_attn.kv_linear@1"),
    (r"attn2\.to_out\.0", "cross_attn.proj"),
    (r"ff\.conv_inverted", "mlp.inverted_conv.conv"),
    (r"ff\.conv_depth", "mlp.depth_conv.conv"),
    (r"ff\.conv_point", "mlp.point_conv.conv"),
    (r"^proj_out", "final_layer.linear"),
    (r"^scale_shift_table", "final_layer.scale_shift_table"),
)
_FLUX_BLOCKS: Subs = (
    (r"^single_transformer_blocks\.(\d+)\.attn\.norm_([qk])\.weight", r"single_blocks.\1.norm.\2@norm.scale"),
    (r"^transformer_blocks", "double_blocks"),
    (r"attn\.to_([qkv])\.", r"img_attn.qkv@\1."),
    (r"attn\.add_([qkv])_proj", r"txt_attn.qkv@\1"),
    (r"attn\.to_out\.0", "img_attn.proj"),
    (r"attn\.to_add_out", "txt_attn.proj"),
    (r"attn\.norm_([qk])\.weight", r"img_attn.norm.\1@norm.scale"),
    (r"attn\.norm_added_([qk])\.weight", r"txt_attn.norm.\1@norm.scale"),
    (r"q@norm", "query_norm"),
    (r"k@norm", "key_norm"),
    (r"@q", "@0"),
    (r"@k", "@1"),
    (r"@v", "@2"),
)
_CHROMA: Subs = (
    (r"^distilled_guidance_layer\.layers\.(\d+)\.linear_1", r"distilled_guidance_layer.layers.\1.in_layer"),
    (r"^distilled_guidance_layer\.layers\.(\d+)\.linear_2", r"distilled_guidance_layer.layers.\1.out_layer"),
    (r"^distilled_guidance_layer\.norms\.(\d+)\.weight", r"distilled_guidance_layer.norms.\1.scale"),
    (r"^context_embedder", "txt_in"),
    (r"^x_embedder", "img_in"),
    (r"ff\.net\.0\.proj", "img_mlp.0"),
    (r"ff\.net\.2", "img_mlp.2"),
    (r"ff_context\.net\.0\.proj", "txt_mlp.0"),
    (r"ff_context\.net\.2", "txt_mlp.2"),
    (r"^single_transformer_blocks\.(\d+)\.attn\.to_q", r"single_blocks.\1.linear1@0"),
    (r"^single_transformer_blocks\.(\d+)\.attn\.to_k", r"single_blocks.\1.linear1@1"),
    (r"^single_transformer_blocks\.(\d+)\.attn\.to_v", r"single_blocks.\1.linear1@2"),
    (r"^single_transformer_blocks\.(\d+)\.proj_mlp", r"single_blocks.\1.linear1@3"),
    (r"^single_transformer_blocks\.(\d+)\.proj_out", r"single_blocks.\1.linear2"),
    (r"^proj_out", "final_layer.linear"),
    *_FLUX_BLOCKS,
)
_FLUX2: Subs = (
    (r"^context_embedder", "txt_in"),
    (r"^x_embedder", "img_in"),
    (r"time_guidance_embed\.timestep_embedder\.linear_1", "time_in.in_layer"),
    (r"time_guidance_embed\.timestep_embedder\.linear_2", "time_in.out_layer"),
    (r"time_guidance_embed\.guidance_embedder\.linear_1", "guidance_in.in_layer"),
    (r"time_guidance_embed\.guidance_embedder\.linear_2", "guidance_in.out_layer"),
    (r"(stream_modulation\w*)\.linear", r"\1.lin"),
    (r"norm_out\.linear", "final_layer.adaLN_modulation.1~swap"),
    (r"^proj_out", "final_layer.linear"),
    (r"^single_transformer_blocks\.(\d+)\.attn\.to_qkv_mlp_proj", r"single_blocks.\1.linear1"),
    (r"^single_transformer_blocks\.(\d+)\.attn\.to_out", r"single_blocks.\1.linear2"),
    (r"ff\.linear_in", "img_mlp.0"),
    (r"ff\.linear_out", "img_mlp.2"),
    (r"ff_context\.linear_in", "txt_mlp.0"),
    (r"ff_context\.linear_out", "txt_mlp.2"),
    *_FLUX_BLOCKS,
)
_COSMOS2: Subs = (
    (r"time_embed\.t_embedder", "t_embedder.1"),
    (r"time_embed\.norm", "t_embedding_norm"),
    (r"^transformer_blocks", "blocks"),
    (r"\.norm1\.linear_", ".adaln_modulation_self_attn."),
    (r"\.norm2\.linear_", ".adaln_modulation_cross_attn."),
    (r"\.norm3\.linear_", ".adaln_modulation_mlp."),
    (r"attn1", "self_attn"),
    (r"attn2", "cross_attn"),
    (r"to_([qkv])\b", r"\1_proj"),
    (r"to_out\.0", "output_proj"),
    (r"norm_([qk])\b", r"\1_norm"),
    (r"ff\.net\.0\.proj", "mlp.layer1"),
    (r"ff\.net\.2", "mlp.layer2"),
    (r"patch_embed\.proj", "x_embedder.proj.1"),
    (r"norm_out\.linear_", "final_layer.adaln_modulation."),
    (r"^proj_out", "final_layer.linear"),
)
_WAN: Subs = (
    (r"condition_embedder\.time_embedder\.linear_1", "time_embedding.0"),
    (r"condition_embedder\.time_embedder\.linear_2", "time_embedding.2"),
    (r"condition_embedder\.text_embedder\.linear_1", "text_embedding.0"),
    (r"condition_embedder\.text_embedder\.linear_2", "text_embedding.2"),
    (r"condition_embedder\.time_proj", "time_projection.1"),
    (r"condition_embedder\.image_embedder\.norm1", "img_emb.proj.0"),
    (r"condition_embedder\.image_embedder\.ff\.net\.0\.proj", "img_emb.proj.1"),
    (r"condition_embedder\.image_embedder\.ff\.net\.2", "img_emb.proj.3"),
    (r"condition_embedder\.image_embedder\.norm2", "img_emb.proj.4"),
    (r"attn1", "self_attn"),
    (r"attn2", "cross_attn"),
    (r"\.to_out\.0\.", ".o."),
    (r"\.to_([qkv])\.", r".\1."),
    (r"\.add_([kv])_proj\.", r".\1_img."),
    (r"norm_added_k", "norm_k_img"),
    (r"^scale_shift_table", "head.modulation"),
    (r"^proj_out", "head.head"),
    (r"scale_shift_table", "modulation"),
    (r"ffn\.net\.0\.proj", "ffn.0"),
    (r"ffn\.net\.2", "ffn.2"),
    (r"(blocks\.\d+)\.norm2", r"\1.norm3"),
    (r"(vace_blocks\.\d+)\.proj_in", r"\1.before_proj"),
    (r"(vace_blocks\.\d+)\.proj_out", r"\1.after_proj"),
)
_MOCHI: Subs = (
    (r"^patch_embed", "x_embedder"),
    (r"time_embed\.timestep_embedder\.linear_1", "t_embedder.mlp.0"),
    (r"time_embed\.timestep_embedder\.linear_2", "t_embedder.mlp.2"),
    (r"time_embed\.pooler\.", "t5_y_embedder."),
    (r"time_embed\.caption_proj", "t5_yproj"),
    (r"^transformer_blocks", "blocks"),
    (r"\.norm1\.linear", ".mod_x"),
    (r"\.norm1_context\.linear(_1)?", ".mod_y"),
    (r"attn1\.to_q", "attn.qkv_x@0"),
    (r"attn1\.to_k", "attn.qkv_x@1"),
    (r"attn1\.to_v", "attn.qkv_x@2"),
    (r"attn1\.add_q_proj", "attn.qkv_y@0"),
    (r"attn1\.add_k_proj", "attn.qkv_y@1"),
    (r"attn1\.add_v_proj", "attn.qkv_y@2"),
    (r"attn1\.to_out\.0", "attn.proj_x"),
    (r"attn1\.to_add_out", "attn.proj_y"),
    (r"attn1\.norm_([qk])\b", r"attn.\1_norm_x"),
    (r"attn1\.norm_added_([qk])\b", r"attn.\1_norm_y"),
    (r"ff\.net\.0\.proj", "mlp_x.w1~swap"),
    (r"ff\.net\.2", "mlp_x.w2"),
    (r"ff_context\.net\.0\.proj", "mlp_y.w1~swap"),
    (r"ff_context\.net\.2", "mlp_y.w2"),
    (r"norm_out\.linear", "final_layer.mod~swap"),
    (r"^proj_out", "final_layer.linear"),
)
_LDM_UNET: Subs = (
    (r"^time_embedding\.linear_1", "time_embed.0"),
    (r"^time_embedding\.linear_2", "time_embed.2"),
    (r"^conv_in", "input_blocks.0.0"),
    (r"^conv_norm_out", "out.0"),
    (r"^conv_out", "out.2"),
    (r"\.norm1\.(weight|bias)$", r".norm1.\1"),
    (r"(resnets\.\d+)\.norm1", r"\1.in_layers.0"),
    (r"(resnets\.\d+)\.conv1", r"\1.in_layers.2"),
    (r"(resnets\.\d+)\.time_emb_proj", r"\1.emb_layers.1"),
    (r"(resnets\.\d+)\.norm2", r"\1.out_layers.0"),
    (r"(resnets\.\d+)\.conv2", r"\1.out_layers.3"),
    (r"(resnets\.\d+)\.conv_shortcut", r"\1.skip_connection"),
    (r"^mid_block\.resnets\.0", "middle_block.0"),
    (r"^mid_block\.attentions\.0", "middle_block.1"),
    (r"^mid_block\.resnets\.1", "middle_block.2"),
    (r"^down_blocks\.(\d)\.downsamplers\.0\.conv", r"D\1.2.0.op"),
    (r"^down_blocks\.(\d)\.resnets\.(\d)", r"D\1.\2.0"),
    (r"^down_blocks\.(\d)\.attentions\.(\d)", r"D\1.\2.1"),
    (r"^up_blocks\.0\.upsamplers\.0", "U0.2.1"),
    (r"^up_blocks\.(\d)\.upsamplers\.0", r"U\1.2.2"),
    (r"^up_blocks\.(\d)\.resnets\.(\d)", r"U\1.\2.0"),
    (r"^up_blocks\.(\d)\.attentions\.(\d)", r"U\1.\2.1"),
    *[(rf"^D{i}\.{j}", f"input_blocks.{3 * i + j + 1}") for i in range(4) for j in range(3)],
    *[(rf"^U{i}\.{j}", f"output_blocks.{3 * i + j}") for i in range(4) for j in range(3)],
)
_OPENCLIP: Subs = (
    (r"^text_model\.", ""),
    (r"^embeddings\.token_embedding\.weight", "token_embedding.weight"),
    (r"^embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"^final_layer_norm", "ln_final"),
    (r"^text_projection\.weight", "text_projection~T"),
    (r"^encoder\.layers", "transformer.resblocks"),
    (r"layer_norm(\d)", r"ln_\1"),
    (r"self_attn\.q_proj\.(\w+)", r"attn.in_proj_\1@0"),
    (r"self_attn\.k_proj\.(\w+)", r"attn.in_proj_\1@1"),
    (r"self_attn\.v_proj\.(\w+)", r"attn.in_proj_\1@2"),
    (r"self_attn\.out_proj", "attn.out_proj"),
    (r"mlp\.fc1", "mlp.c_fc"),
    (r"mlp\.fc2", "mlp.c_proj"),
)
_TIMM_VIT: Subs = (
    (r"^embeddings\.cls_token", "cls_token"),
    (r"^embeddings\.position_embeddings", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection", "patch_embed.proj"),
    (r"^(encoder\.)?layers?\.(\d+)", r"blocks.\2"),
    (r"attention\.attention\.query|attention\.q_proj", "attn.qkv@0"),
    (r"attention\.attention\.key|attention\.k_proj", "attn.qkv@1"),
    (r"attention\.attention\.value|attention\.v_proj", "attn.qkv@2"),
    (r"attention\.output\.dense|attention\.o_proj", "attn.proj"),
    (r"layernorm_before", "norm1"),
    (r"layernorm_after", "norm2"),
    (r"intermediate\.dense", "mlp.fc1"),
    (r"output\.dense", "mlp.fc2"),
    (r"^layernorm", "norm"),
)
_DINOV2: Subs = (
    (r"^embeddings\.cls_token", "cls_token"),
    (r"^embeddings\.mask_token", "mask_token"),
    (r"^embeddings\.position_embeddings", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection", "patch_embed.proj"),
    (r"^(encoder\.)?layers?\.(\d+)", r"blocks.\2"),
    (r"attention\.attention\.query|attention\.q_proj", "attn.qkv@0"),
    (r"attention\.attention\.key|attention\.k_proj", "attn.qkv@1"),
    (r"attention\.attention\.value|attention\.v_proj", "attn.qkv@2"),
    (r"attention\.output\.dense|attention\.o_proj", "attn.proj"),
    (r"layer_scale(\d)\.lambda1", r"ls\1.gamma"),
    (r"^layernorm", "norm"),
)
_WHISPER: Subs = (
    (r"^(encoder|decoder)\.layers", r"\1.blocks"),
    (r"encoder_attn\.", "cross_attn."),
    (r"self_attn\.", "attn."),
    (r"self_attn_layer_norm", "attn_ln"),
    (r"encoder_attn_layer_norm", "cross_attn_ln"),
    (r"final_layer_norm", "mlp_ln"),
    (r"\.q_proj", ".query"),
    (r"\.k_proj", ".key"),
    (r"\.v_proj", ".value"),
    (r"\.out_proj", ".out"),
    (r"\.fc1", ".mlp.0"),
    (r"\.fc2", ".mlp.2"),
    (r"encoder\.layer_norm", "encoder.ln_post"),
    (r"decoder\.layer_norm", "decoder.ln"),
    (r"embed_positions\.weight", "positional_embedding"),
    (r"embed_tokens", "token_embedding"),
)
_META_LLAMA: Subs = (
    (r"^model\.", ""),
    (r"^embed_tokens", "tok_embeddings"),
    (r"^lm_head", "output"),
    (r"input_layernorm", "attention_norm"),
    (r"post_attention_layernorm", "ffn_norm"),
    (r"self_attn\.([qkvo])_proj", r"attention.w\1"),
    (r"mlp\.gate_proj", "feed_forward.w1"),
    (r"mlp\.down_proj", "feed_forward.w2"),
    (r"mlp\.up_proj", "feed_forward.w3"),
)
_GPT2: Subs = ((r"^transformer\.", ""), (r"^h\.(\d+)\.", r"model/h\1/".replace("/", ".")))
_FAIRSEQ_BART: Subs = (
    (r"^(encoder|decoder)\.embed_positions", r"\1.embed_positions"),
    (r"layernorm_embedding", "layernorm_embedding"),
)
_BERT_ORIGINAL: Subs = (
    (r"^embeddings\.LayerNorm", "bert.embeddings.layer_normalization"),
    (r"^embeddings", "bert.embeddings"),
    (r"^encoder\.layer\.(\d+)", r"bert.encoder.layer_\1"),
    (r"attention\.output\.LayerNorm", "attention.output.layer_normalization"),
    (r"output\.LayerNorm", "output.layer_normalization"),
)
_VLLM_STACK: Subs = (  # target: fused modules of vLLM; source: the Hugging Face names
    (r"qkv_proj", "qkv"),
)
_PIXART: Subs = (
    (r"^pos_embed\.proj", "x_embedder.proj"),
    (r"caption_projection\.linear_1", "y_embedder.y_proj.fc1"),
    (r"caption_projection\.linear_2", "y_embedder.y_proj.fc2"),
    (r"adaln_single\.emb\.timestep_embedder\.linear_1", "t_embedder.mlp.0"),
    (r"adaln_single\.emb\.timestep_embedder\.linear_2", "t_embedder.mlp.2"),
    (r"adaln_single\.linear", "t_block.1"),
    (r"^transformer_blocks", "blocks"),
    (r"attn1\.to_q", "attn.qkv@0"),
    (r"attn1\.to_k", "attn.qkv@1"),
    (r"attn1\.to_v", "attn.qkv@2"),
    (r"attn1\.to_out\.0", "attn.proj"),
    (r"attn2\.to_q", "cross_attn.q_linear"),
    (r"attn2\.to_k", "cross_attn.kv_linear@0"),
    (r"attn2\.to_v", "cross_attn.kv_linear@1"),
    (r"attn2\.to_out\.0", "cross_attn.proj"),
    (r"ff\.net\.0\.proj", "mlp.fc1"),
    (r"ff\.net\.2", "mlp.fc2"),
    (r"^proj_out", "final_layer.linear"),
    (r"^scale_shift_table", "final_layer.scale_shift_table"),
)
_COGVIDEOX: Subs = (
    (r"^patch_embed\.proj", "mixins.patch_embed.proj"),
    (r"^patch_embed\.text_proj", "mixins.patch_embed.text_proj"),
    (r"^time_embedding\.linear_1", "time_embed.0"),
    (r"^time_embedding\.linear_2", "time_embed.2"),
    (r"^norm_final", "transformer.final_layernorm"),
    (r"^norm_out\.linear", "mixins.final_layer.adaLN_modulation.1"),
    (r"^norm_out\.norm", "mixins.final_layer.norm_final"),
    (r"^proj_out", "mixins.final_layer.linear"),
    (r"^transformer_blocks\.(\d+)\.norm1\.linear", r"mixins.adaln_layer.adaLN_modulations.\1.1@0"),
    (r"^transformer_blocks\.(\d+)\.norm2\.linear", r"mixins.adaln_layer.adaLN_modulations.\1.1@1"),
    (r"^transformer_blocks\.(\d+)\.attn1\.norm_q", r"mixins.adaln_layer.query_layernorm_list.\1"),
    (r"^transformer_blocks\.(\d+)\.attn1\.norm_k", r"mixins.adaln_layer.key_layernorm_list.\1"),
    (r"^transformer_blocks", "transformer.layers"),
    (r"norm1\.norm", "input_layernorm"),
    (r"norm2\.norm", "post_attn1_layernorm"),
    (r"attn1\.to_q", "attention.query_key_value@0"),
    (r"attn1\.to_k", "attention.query_key_value@1"),
    (r"attn1\.to_v", "attention.query_key_value@2"),
    (r"attn1\.to_out\.0", "attention.dense"),
    (r"ff\.net\.0\.proj", "mlp.dense_h_to_4h"),
    (r"ff\.net\.2", "mlp.dense_4h_to_h"),
)
_HUNYUANDIT_LIKE: Subs = (
    (r"^transformer_blocks", "blocks"),
    (r"attn1\.to_q", "attn1.Wqkv@0"),
    (r"attn1\.to_k", "attn1.Wqkv@1"),
    (r"attn1\.to_v", "attn1.Wqkv@2"),
    (r"attn1\.to_out\.0", "attn1.out_proj"),
    (r"attn2\.to_q", "attn2.q_proj"),
    (r"attn2\.to_k", "attn2.kv_proj@0"),
    (r"attn2\.to_v", "attn2.kv_proj@1"),
    (r"attn2\.to_out\.0", "attn2.out_proj"),
    (r"\.norm_q", ".q_norm"),
    (r"\.norm_k", ".k_norm"),
    (r"norm1\.linear", "default_modulation.1"),
    (r"norm1\.norm", "norm1"),
    (r"(blocks\.\d+\.)norm2\.", r"\1norm@."),
    (r"(blocks\.\d+\.)norm3\.", r"\1norm2."),
    (r"norm@", "norm3"),
    (r"ff\.net\.0\.proj", "mlp.fc1"),
    (r"ff\.net\.2", "mlp.fc2"),
    (r"time_extra_emb\.timestep_embedder\.linear_1", "t_embedder.mlp.0"),
    (r"time_extra_emb\.timestep_embedder\.linear_2", "t_embedder.mlp.2"),
    (r"time_extra_emb\.extra_embedder\.linear_1", "extra_embedder.0"),
    (r"time_extra_emb\.extra_embedder\.linear_2", "extra_embedder.2"),
    (r"time_extra_emb\.pooler", "pooler"),
    (r"time_extra_emb\.style_embedder", "style_embedder"),
    (r"text_embedder\.linear_1", "mlp_t5.0"),
    (r"text_embedder\.linear_2", "mlp_t5.2"),
    (r"^pos_embed\.proj", "x_embedder.proj"),
    (r"norm_out\.linear", "final_layer.adaLN_modulation.1~swap"),
    (r"^proj_out", "final_layer.linear"),
)
_LATTE_LIKE: Subs = (
    (r"attn\.c_attn", "attention.qkv"),
    (r"attn\.c_proj", "attention.o"),
    (r"mlp\.c_fc", "mlp.fc_in"),
    (r"mlp\.c_proj", "mlp.fc_out"),
    (r"(qkv|attention\.o|fc_in|fc_out)\.weight", r"\1.weight~T"),
)
_LITGPT_NEOX: Subs = (  # target: HF GPT-NeoX; source: litgpt
    (r"^gpt_neox\.embed_in", "transformer.wte"),
    (r"^gpt_neox\.final_layer_norm", "transformer.ln_f"),
    (r"^embed_out", "lm_head"),
    (r"^gpt_neox\.layers", "transformer.h"),
    (r"input_layernorm", "norm_1"),
    (r"post_attention_layernorm", "norm_2"),
    (r"attention\.query_key_value", "attn.qkv"),
    (r"attention\.dense", "attn.proj"),
    (r"mlp\.dense_h_to_4h", "mlp.fc"),
    (r"mlp\.dense_4h_to_h", "mlp.proj"),
)
_DC_AE: Subs = (
    (r"^encoder\.conv_in", "encoder.project_in.conv"),
    (r"^encoder\.conv_out", "encoder.project_out.0.conv"),
    (r"^decoder\.conv_in", "decoder.project_in.conv"),
    (r"^decoder\.norm_out", "decoder.project_out.0"),
    (r"^decoder\.conv_out", "decoder.project_out.2.conv"),
    (r"down_blocks", "stages"),
    (r"up_blocks", "stages"),
    (r"(stages\.\d+)\.(\d+)", r"\1.op_list.\2"),
    (r"attn\.to_qkv_multiscale\.0\.proj_in", "context_module.main.aggreg.0.0"),
    (r"attn\.to_qkv_multiscale\.0\.proj_out", "context_module.main.aggreg.0.1"),
    (r"attn\.to_q\.weight", "context_module.main.qkv.conv.weight@0~11"),
    (r"attn\.to_k\.weight", "context_module.main.qkv.conv.weight@1~11"),
    (r"attn\.to_v\.weight", "context_module.main.qkv.conv.weight@2~11"),
    (r"attn\.to_out\.weight", "context_module.main.proj.conv.weight~11"),
    (r"attn\.norm_out", "context_module.main.proj.norm"),
    (r"conv_out\.conv_inverted", "local_module.main.inverted_conv.conv"),
    (r"conv_out\.conv_depth", "local_module.main.depth_conv.conv"),
    (r"conv_out\.conv_point", "local_module.main.point_conv.conv"),
    (r"conv_out\.norm", "local_module.main.point_conv.norm"),
    (r"(op_list\.\d+)\.conv1", r"\1.main.conv1.conv"),
    (r"(op_list\.\d+)\.conv2", r"\1.main.conv2.conv"),
    (r"(op_list\.\d+)\.norm", r"\1.main.conv2.norm"),
    (r"(op_list\.\d+)\.conv\.", r"\1.main.conv.conv."),
)
_ANIMATEDIFF: Subs = (
    (r"(motion_modules\.\d+)\.", r"\1.temporal_transformer."),
    (r"\.norm1", ".norms.0"),
    (r"\.norm2", ".norms.1"),
    (r"\.norm3", ".ff_norm"),
    (r"\.attn1", ".attention_blocks.0"),
    (r"\.attn2", ".attention_blocks.1"),
)


def _ltx2_subs() -> Subs:
    return (
        (r"^audio_proj_in", "audio_patchify_proj"),
        (r"^proj_in", "patchify_proj"),
        (r"av_cross_attn_video_scale_shift", "av_ca_video_scale_shift_adaln_single"),
        (r"av_cross_attn_video_a2v_gate", "av_ca_a2v_gate_adaln_single"),
        (r"av_cross_attn_audio_scale_shift", "av_ca_audio_scale_shift_adaln_single"),
        (r"av_cross_attn_audio_v2a_gate", "av_ca_v2a_gate_adaln_single"),
        (r"video_a2v_cross_attn_scale_shift_table", "scale_shift_table_a2v_ca_video"),
        (r"audio_a2v_cross_attn_scale_shift_table", "scale_shift_table_a2v_ca_audio"),
        (r"^audio_time_embed", "audio_adaln_single"),
        (r"^time_embed", "adaln_single"),
        (r"norm_([qk])\b", r"\1_norm"),
    )


_UNET = dict(
    block_out_channels=(8, 16, 32, 32),
    norm_num_groups=4,
    cross_attention_dim=12,
    attention_head_dim=4,
    sample_size=8,
)
_LLAMA = dict(
    hidden_size=16,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=64,
)

FAMILIES: tuple[Family, ...] = (
    Family(
        "lumina2",
        _diffusers(
            "Lumina2Transformer2DModel",
            hidden_size=96,
            num_layers=3,
            num_refiner_layers=2,
            num_attention_heads=12,
            num_kv_heads=4,
            axes_dim_rope=(4, 2, 2),
            cap_feat_dim=20,
            in_channels=4,
        ),
        _LUMINA2,
        extra={"norm_final.weight": (96,)},
    ),
    Family(
        "auraflow",
        _diffusers(
            "AuraFlowTransformer2DModel",
            num_mmdit_layers=2,
            num_single_dit_layers=3,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=24,
            caption_projection_dim=32,
            pos_embed_max_size=16,
            sample_size=8,
        ),
        _AURAFLOW,
        function="convert_auraflow_transformer_checkpoint_to_diffusers",
    ),
    Family(
        "sana",
        _diffusers(
            "SanaTransformer2DModel",
            in_channels=4,
            out_channels=4,
            num_attention_heads=4,
            attention_head_dim=8,
            num_layers=3,
            num_cross_attention_heads=4,
            cross_attention_head_dim=8,
            cross_attention_dim=32,
            caption_channels=20,
            sample_size=8,
        ),
        _SANA,
        function="convert_sana_transformer_to_diffusers",
        extra={"pos_embed": (1, 64, 32), "y_embedder.y_embedding": (300, 20)},
    ),
    Family(
        "chroma",
        _diffusers(
            "ChromaTransformer2DModel",
            in_channels=4,
            num_layers=3,
            num_single_layers=4,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=24,
            axes_dims_rope=(4, 4, 8),
            approximator_num_channels=16,
            approximator_hidden_dim=40,
            approximator_layers=3,
        ),
        _CHROMA,
        extra={},
    ),
    Family(
        "flux2",
        _diffusers(
            "Flux2Transformer2DModel",
            in_channels=4,
            num_layers=3,
            num_single_layers=3,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=24,
            axes_dims_rope=(4, 4, 4, 4),
            timestep_guidance_channels=32,
        ),
        _FLUX2,
        function="convert_flux2_transformer_checkpoint_to_diffusers",
    ),
    Family(
        "cosmos2",
        _diffusers(
            "CosmosTransformer3DModel",
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=12,
            num_layers=3,
            mlp_ratio=2,
            text_embed_dim=20,
            adaln_lora_dim=8,
            max_size=(4, 8, 8),
            extra_pos_embed_type=None,
        ),
        _COSMOS2,
        prefix="net.",
        function="convert_cosmos_transformer_checkpoint_to_diffusers",
    ),
    Family(
        "wan_i2v",
        _diffusers(
            "WanTransformer3DModel",
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=20,
            freq_dim=16,
            ffn_dim=40,
            num_layers=3,
            image_dim=28,
            added_kv_proj_dim=24,
        ),
        _WAN,
        function="convert_wan_transformer_to_diffusers",
    ),
    Family(
        "wan_vace",
        _diffusers(
            "WanVACETransformer3DModel",
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=20,
            freq_dim=16,
            ffn_dim=40,
            num_layers=4,
            vace_layers=[0, 2],
            vace_in_channels=6,
        ),
        _WAN,
        function="convert_wan_transformer_to_diffusers",
    ),
    Family(
        "mochi",
        _diffusers(
            "MochiTransformer3DModel",
            num_attention_heads=4,
            attention_head_dim=8,
            num_layers=3,
            pooled_projection_dim=16,
            in_channels=4,
            text_embed_dim=20,
            time_embed_dim=12,
        ),
        _MOCHI,
    ),
    Family(
        "ltx2",
        _diffusers(
            "LTX2VideoTransformer3DModel",
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=12,
            cross_attention_dim=24,
            audio_in_channels=3,
            audio_out_channels=3,
            audio_num_attention_heads=2,
            audio_attention_head_dim=8,
            audio_cross_attention_dim=16,
            num_layers=2,
            caption_channels=20,
        ),
        _ltx2_subs(),
        prefix="model.diffusion_model.",
        function="convert_ltx2_transformer_to_diffusers",
    ),
    Family("ldm_unet", _diffusers("UNet2DConditionModel", **_UNET), _LDM_UNET, prefix="model.diffusion_model."),
    Family(
        "dc_ae",
        _diffusers(
            "AutoencoderDC",
            in_channels=3,
            latent_channels=4,
            attention_head_dim=4,
            encoder_block_types=["ResBlock", "ResBlock", "EfficientViTBlock"],
            decoder_block_types=["ResBlock", "ResBlock", "EfficientViTBlock"],
            encoder_block_out_channels=(8, 16, 32),
            decoder_block_out_channels=(8, 16, 32),
            encoder_layers_per_block=(2, 2, 2),
            decoder_layers_per_block=(2, 2, 2),
            encoder_qkv_multiscales=((), (), (5,)),
            decoder_qkv_multiscales=((), (), (5,)),
            downsample_block_type="Conv",
            upsample_block_type="interpolate",
        ),
        _DC_AE,
        function="convert_autoencoder_dc_checkpoint_to_diffusers",
    ),
    Family(
        "animatediff",
        _diffusers("MotionAdapter", block_out_channels=(8, 16), motion_layers_per_block=2, motion_norm_num_groups=4),
        _ANIMATEDIFF,
    ),
    Family(
        "pixart",
        _diffusers(
            "PixArtTransformer2DModel",
            num_attention_heads=4,
            attention_head_dim=8,
            in_channels=4,
            out_channels=8,
            num_layers=3,
            cross_attention_dim=32,
            caption_channels=20,
            sample_size=8,
            norm_num_groups=4,
        ),
        _PIXART,
        extra={"pos_embed": (1, 16, 32), "y_embedder.y_embedding": (120, 20)},
    ),
    Family(
        "cogvideox",
        _diffusers(
            "CogVideoXTransformer3DModel",
            num_attention_heads=4,
            attention_head_dim=8,
            in_channels=4,
            out_channels=4,
            time_embed_dim=16,
            text_embed_dim=20,
            num_layers=3,
        ),
        _COGVIDEOX,
        prefix="model.diffusion_model.",
    ),
    Family(
        "hunyuandit",
        _diffusers(
            "HunyuanDiT2DModel",
            num_attention_heads=4,
            attention_head_dim=8,
            in_channels=4,
            hidden_size=32,
            num_layers=4,
            cross_attention_dim=24,
            pooled_projection_dim=16,
            text_len=7,
            text_len_t5=9,
            sample_size=8,
            patch_size=2,
            cross_attention_dim_t5=20,
        ),
        _HUNYUANDIT_LIKE,
    ),
    Family(
        "openclip_text",
        _transformers(
            "CLIPTextModelWithProjection",
            "CLIPTextConfig",
            hidden_size=16,
            intermediate_size=40,
            num_hidden_layers=3,
            num_attention_heads=2,
            vocab_size=64,
            max_position_embeddings=12,
            projection_dim=20,
        ),
        _OPENCLIP,
        prefix="cond_stage_model.model.",
    ),
    Family(
        "timm_vit",
        _transformers(
            "ViTModel",
            "ViTConfig",
            hidden_size=16,
            intermediate_size=40,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=16,
            patch_size=4,
        ),
        (*_TIMM_VIT, (r"^pooler\.dense", "pre_logits.fc")),
    ),
    Family(
        "dinov2",
        _transformers(
            "Dinov2Model",
            "Dinov2Config",
            hidden_size=16,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=16,
            patch_size=4,
        ),
        _DINOV2,
    ),
    Family(
        "whisper",
        _transformers(
            "WhisperModel",
            "WhisperConfig",
            d_model=16,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=40,
            decoder_ffn_dim=40,
            vocab_size=64,
            num_mel_bins=8,
            max_source_positions=12,
            max_target_positions=14,
            pad_token_id=0,
        ),
        _WHISPER,
    ),
    Family("meta_llama", _transformers("LlamaForCausalLM", "LlamaConfig", **_LLAMA), _META_LLAMA),
    Family(
        "gpt2_linear",
        _transformers(
            "GPT2LMHeadModel", "GPT2Config", n_embd=16, n_layer=3, n_head=2, vocab_size=64, n_positions=12
        ),
        _LATTE_LIKE,
    ),
    Family(
        "litgpt_neox",
        _transformers(
            "GPTNeoXForCausalLM",
            "GPTNeoXConfig",
            hidden_size=16,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=40,
            vocab_size=64,
        ),
        _LITGPT_NEOX,
    ),
    Family(
        "bert_original",
        _transformers(
            "BertModel",
            "BertConfig",
            hidden_size=16,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=40,
            vocab_size=64,
        ),
        _BERT_ORIGINAL,
    ),
)


def manifests(family: Family) -> tuple[dict[str, Shape], dict[str, Shape], dict[str, dict[str, Any]]]:
    """(source, target, truth) of a family; the truth in the oracles' schema."""
    import torch

    with torch.device("meta"):
        module = family.build()
    target = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    parts: dict[str, dict[int, tuple[str, Shape]]] = defaultdict(dict)
    truth: dict[str, dict[str, Any]] = {}
    source: dict[str, Shape] = {}
    for name, shape in target.items():
        given = name
        for pattern, replacement in family.subs:
            given = re.sub(pattern, replacement, given)
        marks = set(re.findall(r"~(\w+?)(?=[.~@]|$)", given))
        given = family.prefix + re.sub(r"~\w+?(?=[.~@]|$)", "", given)
        part = re.search(r"@(\d)", given)
        whole = given.replace(part[0], "") if part else given
        if part:
            parts[whole][int(part[1])] = (name, (*shape, 1, 1) if "11" in marks else shape)
            continue
        truth[name], source[whole] = _single(whole, shape, marks)
    for whole, members in parts.items():
        source[whole] = (sum(shape[0] for _, shape in members.values()), *members[0][1][1:])
        start = 0
        for _, (name, shape) in sorted(members.items()):
            detail: dict[str, Any] = {"dim": 0, "start": start, "stop": start + shape[0]}
            if shape != target[name]:
                detail["reshape"] = list(target[name])
            truth[name] = {"from": [whole], "op": "split", "detail": detail}
            start += shape[0]
    source.update({family.prefix + name: shape for name, shape in family.extra.items()})
    return source, target, truth


def _single(whole: str, shape: Shape, marks: set[str]) -> tuple[dict[str, Any], Shape]:
    if "swap" in marks:
        half = shape[0] // 2
        detail = {"dim": 0, "runs": [[half, shape[0]], [0, half]]}
        return {"from": [whole], "op": "reorder", "detail": detail}, shape
    if "T" in marks and len(shape) == 2:
        return {"from": [whole], "op": "transpose", "detail": {"perm": [1, 0]}}, shape[::-1]
    if "11" in marks:
        return {"from": [whole], "op": "reshape", "detail": {"shape": list(shape)}}, (*shape, 1, 1)
    return {"from": [whole], "op": "copy", "detail": {}}, shape
