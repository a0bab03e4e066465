"""Tiny language models as text encoders, and their byte-pair tokenizers."""

from __future__ import annotations

from typing import Any

#: Tokens of one character; ``Ġ`` and ``Ċ`` stand for the space and the end of a line.
_CHARACTERS = [*(chr(code) for code in range(33, 127)), "Ġ", "Ċ", "▁", "\n", " "]
#: Special tokens that some tokenizer uses.
_SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<s>", "</s>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
#: Vision tokens of Qwen's models.
_VISION = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
VOCABULARY = {token: index for index, token in enumerate([*_SPECIAL, *_VISION, *_CHARACTERS])}
#: Template of a conversation.
_CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SIZES = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": len(VOCABULARY)}


def qwen_tokenizer() -> Any:
    """Return a tokenizer of Qwen without merges, with a template of conversations."""
    from transformers import Qwen2Tokenizer

    tokenizer = Qwen2Tokenizer(vocab=VOCABULARY, merges=[], additional_special_tokens=["<|im_start|>", "<|im_end|>"])
    tokenizer.chat_template = _CHAT
    return tokenizer


def gemma_tokenizer() -> Any:
    """Return a tokenizer of Gemma without merges."""
    from transformers import GemmaTokenizer

    return GemmaTokenizer(vocab=VOCABULARY, merges=[])


def llama_tokenizer() -> Any:
    """Return a tokenizer of Llama without merges."""
    from transformers import LlamaTokenizerFast

    return LlamaTokenizerFast(vocab=VOCABULARY, merges=[], pad_token="<pad>")


def gemma2_encoder(width: int = 16) -> Any:
    """Return Gemma 2 with two layers."""
    from transformers import Gemma2Config, Gemma2Model

    return Gemma2Model(Gemma2Config(hidden_size=width, intermediate_size=32, head_dim=8, **_SIZES))


def llama_encoder(width: int = 16) -> Any:
    """Return Llama with three layers."""
    from transformers import LlamaConfig, LlamaModel

    return LlamaModel(LlamaConfig(hidden_size=width, intermediate_size=32, **{**_SIZES, "num_hidden_layers": 3}))


def glm_encoder(width: int = 16) -> Any:
    """Return GLM with two layers."""
    from transformers import GlmConfig, GlmModel

    return GlmModel(GlmConfig(hidden_size=width, intermediate_size=32, head_dim=8, pad_token_id=0, **_SIZES))


def qwen3_encoder(width: int = 16) -> Any:
    """Return Qwen 3 with two layers."""
    from transformers import Qwen3Config, Qwen3Model

    return Qwen3Model(Qwen3Config(hidden_size=width, intermediate_size=32, head_dim=8, **_SIZES))


def qwen_vl_encoder(width: int = 16) -> Any:
    """Return Qwen 2.5 VL with two layers of text and of vision."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = {
        "hidden_size": width,
        "intermediate_size": 32,
        "rope_parameters": {"mrope_section": [1, 1, 2], "rope_type": "default", "rope_theta": 1e6},
        **_SIZES,
    }
    vision = {"depth": 2, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": width}
    tokens = {
        f"{name}_token_id": VOCABULARY[token]
        for name, token in zip(("vision_start", "vision_end", "image", "video"), _VISION, strict=True)
    }
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision, **tokens))
