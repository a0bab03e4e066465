"""Rules for a checkpoint whose queries, keys and values, and halves of the feed-forward, are separate."""

from __future__ import annotations

from port_kit.remap import Rule, RuleSet

_LAYER = r"(joint_blocks|single_blocks)\.(\d+)\.(audio|text)"

TRANSFORMER = RuleSet(
    name="joint_attention",
    allow_downcast=True,  # a float32 checkpoint may be run in bfloat16
    rules=(
        Rule(rf"{_LAYER}\.([qkv])\.(weight|bias)", r"\1.\2.\3.qkv.\5", shard=r"\4"),
        Rule(rf"{_LAYER}\.(norm_q|norm_k)\.weight", r"\1.\2.\3.\4.weight"),
        Rule(rf"{_LAYER}\.(modulation|out)\.(weight|bias)", r"\1.\2.\3.\4.\5"),
        Rule(
            r"(joint_blocks|single_blocks)\.(\d+)\.audio\.feed_forward\.(gate|up|down)\.(weight|bias)",
            r"\1.\2.audio.feed_forward.\3.\4",
        ),
        Rule(
            r"joint_blocks\.(\d+)\.text\.feed_forward\.gate\.(weight|bias)",
            r"joint_blocks.\1.text.feed_forward.up.\2",
            shard="0",
        ),
        Rule(
            r"joint_blocks\.(\d+)\.text\.feed_forward\.up\.(weight|bias)",
            r"joint_blocks.\1.text.feed_forward.up.\2",
            shard="1",
        ),
        Rule(
            r"joint_blocks\.(\d+)\.text\.feed_forward\.down\.(weight|bias)",
            r"joint_blocks.\1.text.feed_forward.down.\2",
        ),
        Rule(r"(audio_in|text_in|time|head)\.(weight|bias)", r"\1.\2"),
    ),
)
