"""Engine options that a platform or a combination cannot have: refused before an engine starts its workers.

vLLM-Omni would take some of them and do without, or fail at the first request. A port calls :func:`check_options`
where vLLM-Omni shows it the engine's configuration first, in its post-process factory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from port_kit.errors import InputError

if TYPE_CHECKING:
    from vllm_omni.diffusion.data import OmniDiffusionConfig

#: Options that move weights between the host's memory and a device's.
OFFLOADS = ("enable_cpu_offload", "enable_layerwise_offload", "enable_distributed_layerwise_offload")


def check_options(config: OmniDiffusionConfig) -> None:
    """Refuse what cannot run, by name.

    Raises:
        InputError: ``engine_option``.
    """
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        for name in OFFLOADS:
            if getattr(config, name, False):
                raise _refused(f"{name} is on, and the weights are in the CPU's memory already", f"leave {name} out")
        if config.quantization_config is not None:
            method = config.quantization_config.get_name()
            raise _refused(
                f"quantization={method!r} was asked for; its kernels need an accelerator", "leave quantization out"
            )
    if config.cache_backend in (None, "none"):
        return
    if config.step_execution or config.streaming_output:
        raise _refused(
            f"step_execution with cache_backend={config.cache_backend!r}; requests would share one cache",
            "leave one of the two out",
        )
    if config.max_num_seqs > 1:
        raise _refused(
            f"max_num_seqs={config.max_num_seqs} with cache_backend={config.cache_backend!r}; "
            "requests would share one cache",
            "set max_num_seqs to 1, or leave the cache out",
        )


def _refused(problem: str, hint: str) -> InputError:
    return InputError(problem, code="engine_option", hint=hint)
