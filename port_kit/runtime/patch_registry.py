"""Registry of the patches of upstream behavior, and of the upstream internals that the kit uses.

``patches.md`` has one section per entry of :data:`PATCHES`, under the same name.
:mod:`port_kit.runtime.upstream_checks` compares an entry's preconditions with the installed upstream.
"""

from __future__ import annotations

from dataclasses import dataclass

#: Release series of vLLM-Omni that the patches are tested with.
SUPPORTED_SERIES = "0.30"


@dataclass(frozen=True)
class Precondition:
    """Property of upstream that a patch depends on.

    Attributes:
        kind: kind of property, a key of :data:`port_kit.runtime.upstream_checks.READERS`.
        target: ``"module:attribute.path"``, or the name of an operator.
        expected: accepted values.
    """

    kind: str
    target: str
    expected: tuple[str, ...]


@dataclass(frozen=True)
class Patch:
    """Registry entry: name, one-line summary and preconditions."""

    name: str
    summary: str
    preconditions: tuple[Precondition, ...]


PATCHES: dict[str, Patch] = {
    patch.name: patch
    for patch in (
        Patch(
            "cpu_platform",
            "a platform for CPUs through the platform interface",
            (
                Precondition(
                    "parameters", "vllm_omni.platforms.interface:OmniPlatform.get_diffusion_worker_cls", ("",)
                ),
                Precondition(
                    "parameters",
                    "vllm_omni.platforms.interface:OmniPlatform.get_diffusion_attn_backend_cls",
                    ("selected_backend, head_size, allow_trtllm_default",),
                ),
            ),
        ),
        Patch(
            "sdpa_forward",
            "SDPA called without the dispatch over accelerators",
            (
                Precondition(
                    "parameters",
                    "vllm_omni.diffusion.attention.backends.sdpa:SDPAImpl._forward_impl",
                    ("self, query, key, value, attn_metadata, mask_mode",),
                ),
            ),
        ),
        Patch(
            "async_output_loop",
            "outputs packed without a device stream",
            (
                Precondition(
                    "source",
                    "vllm_omni.diffusion.worker.diffusion_worker:WorkerProc._async_output_loop",
                    ("a8b089e936400760",),
                ),
                Precondition(
                    "parameters",
                    "vllm_omni.diffusion.ipc:pack_diffusion_output_shm",
                    ("output, d2h_stream",),
                ),
            ),
        ),
        Patch(
            "ring_attention_kernel",
            "a CPU kernel for Ring attention's operator",
            (
                Precondition(
                    "schema",
                    "aten::_scaled_dot_product_efficient_attention",
                    (
                        "(Tensor query, Tensor key, Tensor value, Tensor? attn_bias, bool compute_log_sumexp,"
                        " float dropout_p=0., bool is_causal=False, *, float? scale=None) -> (Tensor output,"
                        " Tensor log_sumexp, Tensor philox_seed, Tensor philox_offset)",
                    ),
                ),
                Precondition(
                    "schema",
                    "aten::_scaled_dot_product_flash_attention_for_cpu",
                    (
                        "(Tensor query, Tensor key, Tensor value, float dropout_p=0., bool is_causal=False,"
                        " *, Tensor? attn_mask=None, float? scale=None) -> (Tensor output, Tensor logsumexp)",
                    ),
                ),
                Precondition("cpu_kernel", "aten::_scaled_dot_product_efficient_attention", ("none",)),
            ),
        ),
        Patch(
            "output_type",
            "a port's modality in vLLM-Omni's model metadata",
            (
                Precondition("type", "vllm_omni.diffusion.model_metadata:_DIFFUSION_MODEL_METADATA", ("dict",)),
                Precondition(
                    "annotation",
                    "vllm_omni.diffusion.model_metadata:DiffusionModelMetadata.final_output_type",
                    ("str | None",),
                ),
            ),
        ),
        Patch(
            "references",
            "a port's reference media in the tables of the video endpoints",
            (
                Precondition("type", "vllm_omni.diffusion.model_metadata:_DIFFUSION_MODEL_METADATA", ("dict",)),
                Precondition(
                    "annotation",
                    "vllm_omni.diffusion.model_metadata:DiffusionModelMetadata.supports_mixed_reference_inputs",
                    ("<class 'bool'>",),
                ),
                Precondition("type", "vllm_omni.model_extras.registry:_EXTRA_SPECS", ("dict",)),
                Precondition(
                    "source",
                    "vllm_omni.model_extras.registry:should_preserve_reference_image_size",
                    ("197b1a2774d907d8",),
                ),
            ),
        ),
        Patch(
            "refused_request",
            "an engine that stays open after a client error",
            (Precondition("source", "vllm_omni.entrypoints.omni:Omni.generate", ("eeae6cd3c0c54eb4",)),),
        ),
        Patch(
            "malformed_forms",
            "status 400 instead of 500 for malformed video requests",
            (
                Precondition(
                    "source",
                    "vllm_omni.entrypoints.openai.video.generation.helpers:_parse_form_json",
                    ("2a181adfe177ce6a",),
                ),
                Precondition(
                    "source", "vllm_omni.entrypoints.openai.image_api_utils:parse_size", ("9e3bc57ec589e4de",)
                ),
            ),
        ),
    )
}
