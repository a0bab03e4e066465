"""Clips: the settings that a file carries, requests from a file of prompts, and clips of several segments.

A clip is a file that ``port-kit generate`` writes: an MP4, a WAV or a PNG.
"""

from port_kit.clips.joining import Joined, join_results, last_frame
from port_kit.clips.loras import check_loras, lora_reference
from port_kit.clips.options import check_first_frame, option_types, reference_names
from port_kit.clips.prompts import Line, read_prompts
from port_kit.clips.settings import ClipSettings, Reference, attach_settings, describe_model, read_settings

__all__ = [
    "ClipSettings",
    "Joined",
    "Line",
    "Reference",
    "attach_settings",
    "check_first_frame",
    "check_loras",
    "describe_model",
    "join_results",
    "last_frame",
    "lora_reference",
    "option_types",
    "read_prompts",
    "read_settings",
    "reference_names",
]
