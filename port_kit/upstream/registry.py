"""Registry of the patches of upstream behavior, and of the upstream internals that the kit uses.

``patches.md`` has one section per entry of :data:`PATCHES`, under the same name. ``uses.toml`` holds :data:`USES`.
:mod:`port_kit.upstream.checks` compares an entry's preconditions with the installed upstream.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from port_kit.upstream.series import SERIES


@dataclass(frozen=True)
class Precondition:
    """Property of upstream that the kit depends on.

    Attributes:
        kind: kind of property, a key of ``READERS`` or ``SUBSETS`` in :mod:`port_kit.upstream.checks`.
        target: ``"module:attribute.path"``, ``"module"``, or the name of an operator.
        expected: value in every supported series, or values by series.
    """

    kind: str
    target: str
    expected: str | Mapping[str, str]


@dataclass(frozen=True)
class Entry:
    """Registry entry.

    Attributes:
        name: key of the entry.
        summary: one line.
        preconditions: properties of upstream that the entry depends on.
        threads: issues and pull requests of upstream about the same fault; empty if none was found.
        series: series that need the patch; in the others, upstream has no such fault and nothing is checked or changed.
    """

    name: str
    summary: str
    preconditions: tuple[Precondition, ...]
    threads: tuple[str, ...] = ()
    series: tuple[str, ...] = SERIES


def _by_series(*values: str) -> dict[str, str]:
    return dict(zip(SERIES, values, strict=True))


PATCHES: dict[str, Entry] = {
    entry.name: entry
    for entry in (
        Entry(
            "cpu_platform",
            "a platform for CPUs through the platform interface",
            (
                Precondition("parameters", "vllm_omni.platforms.interface:OmniPlatform.get_diffusion_worker_cls", ""),
                Precondition(
                    "parameters",
                    "vllm_omni.platforms.interface:OmniPlatform.get_diffusion_attn_backend_cls",
                    "selected_backend, head_size, allow_trtllm_default",
                ),
            ),
            threads=(
                "https://github.com/vllm-project/vllm-omni/pull/4665",
                "https://github.com/vllm-project/vllm-omni/issues/1095",
            ),
        ),
        Entry(
            "sdpa_forward",
            "SDPA called without the dispatch over accelerators",
            (
                Precondition(
                    "parameters",
                    "vllm_omni.diffusion.attention.backends.sdpa:SDPAImpl._forward_impl",
                    _by_series(
                        "self, query, key, value, attn_metadata, mask_mode",
                        "self, query, key, value, attn_metadata, mask_mode, use_gqa_custom_op",
                    ),
                ),
            ),
            threads=("https://github.com/vllm-project/vllm-omni/pull/3239",),
        ),
        Entry(
            "async_output_loop",
            "outputs packed without a device stream",
            (
                Precondition(
                    "source",
                    "vllm_omni.diffusion.worker.diffusion_worker:WorkerProc._async_output_loop",
                    _by_series("a8b089e936400760", "7975ee53169eaa33"),
                ),
                Precondition(
                    "parameters",
                    "vllm_omni.diffusion.ipc:pack_diffusion_output_shm",
                    _by_series("output, d2h_stream", "output, d2h_stream, enable_registered_shm"),
                ),
            ),
        ),
        Entry(
            "ring_attention_kernel",
            "a CPU kernel for Ring attention's operator",
            (
                Precondition(
                    "schema",
                    "aten::_scaled_dot_product_efficient_attention",
                    (
                        "(Tensor query, Tensor key, Tensor value, Tensor? attn_bias, bool compute_log_sumexp,"
                        " float dropout_p=0., bool is_causal=False, *, float? scale=None) -> (Tensor output,"
                        " Tensor log_sumexp, Tensor philox_seed, Tensor philox_offset)"
                    ),
                ),
                Precondition(
                    "schema",
                    "aten::_scaled_dot_product_flash_attention_for_cpu",
                    (
                        "(Tensor query, Tensor key, Tensor value, float dropout_p=0., bool is_causal=False,"
                        " *, Tensor? attn_mask=None, float? scale=None) -> (Tensor output, Tensor logsumexp)"
                    ),
                ),
                Precondition("cpu_kernel", "aten::_scaled_dot_product_efficient_attention", "none"),
            ),
            threads=(
                "https://github.com/vllm-project/vllm-omni/pull/755",
                "https://github.com/pytorch/pytorch/pull/104238",
            ),
        ),
        Entry(
            "output_type",
            "a port's modality in vLLM-Omni's model metadata",
            (
                Precondition("type", "vllm_omni.diffusion.model_metadata:_DIFFUSION_MODEL_METADATA", "dict"),
                Precondition(
                    "annotation",
                    "vllm_omni.diffusion.model_metadata:DiffusionModelMetadata.final_output_type",
                    "str | None",
                ),
            ),
            threads=("https://github.com/vllm-project/vllm-omni/issues/6951",),
        ),
        Entry(
            "references",
            "a port's reference media in the tables of the video endpoints",
            (
                Precondition("type", "vllm_omni.diffusion.model_metadata:_DIFFUSION_MODEL_METADATA", "dict"),
                Precondition(
                    "annotation",
                    "vllm_omni.diffusion.model_metadata:DiffusionModelMetadata.supports_mixed_reference_inputs",
                    "<class 'bool'>",
                ),
                Precondition("type", "vllm_omni.model_extras.registry:_EXTRA_SPECS", "dict"),
                Precondition(
                    "source", "vllm_omni.model_extras.registry:should_preserve_reference_image_size", "197b1a2774d907d8"
                ),
            ),
            threads=(
                "https://github.com/vllm-project/vllm-omni/issues/5883",
                "https://github.com/vllm-project/vllm-omni/pull/6942",
            ),
        ),
        Entry(
            "refused_request",
            "an engine that stays open after a client error, and lists with refused requests",
            (
                Precondition("source", "vllm_omni.entrypoints.omni:Omni.generate", "eeae6cd3c0c54eb4"),
                Precondition("source", "vllm_omni.entrypoints.omni:Omni._run_generation", "cc74eb057df53246"),
                Precondition(
                    "source", "vllm_omni.entrypoints.omni_base:OmniBase._check_engine_output_error", "b2f2703a901cd81e"
                ),
                Precondition("source", "vllm_omni.entrypoints.omni_base:OmniBase._shutdown_base", "b18ece29237c39d4"),
            ),
            threads=("https://github.com/vllm-project/vllm-omni/pull/6334",),
        ),
        Entry(
            "lora_rank",
            "results with a LoRA that do not depend on earlier requests",
            (
                Precondition(
                    "source",
                    "vllm_omni.diffusion.lora.manager:DiffusionLoRAManager._ensure_max_lora_rank",
                    _by_series("1596255ed8567a94", "262190dc1e6b16cc"),
                ),
                Precondition(
                    "source",
                    "vllm_omni.diffusion.lora.manager:DiffusionLoRAManager._activate_adapter",
                    _by_series("868cd46516abd187", "a84cfafc9f9774e0"),
                ),
                Precondition(
                    "parameters",
                    "vllm_omni.diffusion.lora.manager:DiffusionLoRAManager._bind_adapter_weights",
                    "self, lora_model, scale",
                ),
            ),
        ),
        Entry(
            "malformed_forms",
            "status 400 instead of 500 for malformed video requests",
            (
                Precondition(
                    "source",
                    "vllm_omni.entrypoints.openai.video.generation.helpers:_parse_form_json",
                    "2a181adfe177ce6a",
                ),
                Precondition("source", "vllm_omni.entrypoints.openai.image_api_utils:parse_size", "9e3bc57ec589e4de"),
            ),
        ),
        Entry(
            "damaged_index",
            "the name of a damaged model_index.json in its error",
            (
                Precondition(
                    "parameters",
                    "vllm.transformers_utils.config:get_hf_file_to_dict",
                    "file_name, model, revision",
                ),
            ),
            series=("0.30",),
        ),
        Entry(
            "audio_sample_rate",
            "the sample rate of audio files of /v1/audio/generate",
            (
                Precondition(
                    "source",
                    "vllm_omni.diffusion.output_formatter:_format_audio_multimodal_output",
                    "a97670b16b603605",
                ),
                Precondition(
                    "mentions",
                    "vllm_omni.entrypoints.openai.serving_audio_generate"
                    ":OmniOpenAIServingAudioGenerate.create_audio_generate",
                    "audio_output, sr",
                ),
            ),
            series=("0.30",),
        ),
        Entry(
            "video_storage",
            "storage that deletes its own files only, in servers of port-kit serve",
            (
                Precondition(
                    "source",
                    "vllm_omni.entrypoints.openai.storage:LocalStorageTTLManager._sweep_once",
                    "03b27f1235f1ddae",
                ),
                Precondition(
                    "mentions",
                    "vllm_omni.entrypoints.openai.video.generation.helpers:_run_video_generation_job",
                    "STORAGE_MANAGER, save",
                ),
                Precondition(
                    "mentions", "vllm_omni.entrypoints.openai.api_server:download_video", "STORAGE_MANAGER, open, path"
                ),
                Precondition("mentions", "vllm_omni.entrypoints.openai.api_server:delete_video", "STORAGE_MANAGER"),
            ),
        ),
        Entry(
            "late_decoding",
            "images of waiting requests are not decoded, in servers of port-kit serve",
            (
                Precondition(
                    "source", "vllm_omni.entrypoints.openai.video_api_utils:_decode_image_bytes", "74afc3d4867141e9"
                ),
                Precondition(
                    "mentions",
                    "vllm_omni.entrypoints.openai.video_api_utils:_decode_media_bytes",
                    "_decode_image_bytes",
                ),
                Precondition(
                    "mentions",
                    "vllm_omni.entrypoints.openai.video.generation.helpers:_persist_uploaded_media_references",
                    "_decode_image_bytes",
                ),
            ),
        ),
        Entry(
            "engine_shutdown",
            "time for running requests before the engine stops, in servers of port-kit serve",
            (
                Precondition("mentions", "vllm.entrypoints.launchers.launcher:serve_http", "engine_client, shutdown"),
                Precondition("mentions", "vllm_omni.entrypoints.utils:PureDiffusionLauncherAdapter", "_wrapped"),
            ),
        ),
    )
}

USES_FILE = Path(__file__).with_name("uses.toml")


def read_uses(text: str) -> dict[str, Entry]:
    """Return the entries of a TOML document: per entry a summary and, per kind, a table of targets and values."""
    return {name: _entry(name, **table) for name, table in tomllib.loads(text).items()}


def _entry(name: str, *, summary: str, series: Sequence[str] = SERIES, **kinds: Mapping[str, Any]) -> Entry:
    preconditions = [Precondition(kind, *item) for kind, table in kinds.items() for item in table.items()]
    return Entry(name, summary, tuple(preconditions), series=tuple(series))


#: Private names and behavior that the kit relies on without changing them.
USES = read_uses(USES_FILE.read_text(encoding="utf-8"))

REGISTRY = PATCHES | USES
