"""Checks of engine options that a platform or a combination of options does not support.

vLLM-Omni ignores some of them, or fails at the first request. A port calls :func:`check_options` in its post-process
factory, before workers start.
"""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING

from port_kit.errors import InputError
from port_kit.escape import quoted
from port_kit.upstream.checks import require

if TYPE_CHECKING:
    from vllm_omni.diffusion.data import OmniDiffusionConfig

#: Options that move weights between host and device memory.
OFFLOADS = ("enable_cpu_offload", "enable_layerwise_offload", "enable_distributed_layerwise_offload")


def check_options(config: OmniDiffusionConfig) -> None:
    """Check engine options.

    Raises:
        InputError: ``engine_option``; the platform or another option excludes an option. ``details["option"]`` is its
            name.
    """
    require("engine_config")
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        for name in OFFLOADS:
            if getattr(config, name, False):
                raise _unsupported(name, "weights are in CPU memory already", f"remove {name}")
        if config.quantization_config is not None:
            method = config.quantization_config.get_name()
            raise _unsupported("quantization", f"{quoted(method)} needs an accelerator", "remove quantization")
        if config.diffusion_kv_cache_dtype not in (None, "auto", "float"):
            raise _unsupported("diffusion_kv_cache_dtype", "it needs an accelerator", "remove diffusion_kv_cache_dtype")
    if getattr(config, "hsdp_weight_load_strategy", "full") != "full":
        reason = "a port reads its shards under HSDP without it, and vLLM-Omni's reader supports three own models only"
        raise _unsupported("hsdp_weight_load_strategy", reason, "remove hsdp_weight_load_strategy")
    for field in fields(config.video_output_transport):
        if getattr(config.video_output_transport, field.name):
            reason = f"{field.name} affects outputs of video alone; a port converts frames on the device without it"
            raise _unsupported("video_output_transport", reason, "remove video_output_transport")
    _check_cache(config)


def _check_cache(config: OmniDiffusionConfig) -> None:
    if config.cache_backend in (None, "none"):
        return
    cache = f"requests would share the cache of cache_backend={quoted(config.cache_backend)}"
    if config.step_execution or config.streaming_output:
        raise _unsupported("step_execution", cache, "remove step_execution or cache_backend")
    if config.max_num_seqs > 1:
        raise _unsupported("max_num_seqs", f"{cache}: expected 1, got {config.max_num_seqs}", "set max_num_seqs to 1")


def _unsupported(option: str, reason: str, hint: str) -> InputError:
    return InputError(f"Option {option} is not supported: {reason}.", code="engine_option", hint=hint, option=option)
