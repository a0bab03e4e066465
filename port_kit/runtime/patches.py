"""Patches of upstream behavior, each applied after its preconditions are checked.

``port_kit/upstream/patches.md`` describes them; :mod:`port_kit.upstream.registry` lists their preconditions.
"""

from __future__ import annotations

import sys
from collections.abc import Collection
from typing import TYPE_CHECKING

from port_kit.upstream.checks import OWN_KERNELS, is_needed, require
from port_kit.upstream.metadata import timeline_guides

if TYPE_CHECKING:
    import torch

_RING_OPERATOR = "aten::_scaled_dot_product_efficient_attention"

_installed: set[str] = set()
_libraries: list[torch.library.Library] = []


def installed() -> list[str]:
    """Return the sorted names of the patches that are applied in this process."""
    return sorted(_installed)


def install_worker_fixes() -> None:
    """Apply both CPU worker patches, once per process.

    Raises:
        RegistrationError: ``upstream_changed``.
    """
    if "async_output_loop" not in _installed:
        _install_output_loop()
    if "ring_attention_kernel" not in _installed:
        _install_ring_kernel()


def _install_output_loop() -> None:
    require("async_output_loop")
    from vllm_omni.diffusion.worker.diffusion_worker import WorkerProc

    from port_kit.runtime.worker import async_output_loop

    WorkerProc._async_output_loop = async_output_loop
    _installed.add("async_output_loop")


def _install_ring_kernel() -> None:
    require("ring_attention_kernel")
    import torch

    from port_kit.runtime.worker import efficient_attention_cpu

    library = torch.library.Library("aten", "IMPL", "CPU")
    library.impl(_RING_OPERATOR.removeprefix("aten::"), efficient_attention_cpu)
    _libraries.append(library)  # the registration lives as long as this object
    OWN_KERNELS.add(_RING_OPERATOR)
    _installed.add("ring_attention_kernel")


def size_lora_buffers_by_adapter() -> None:
    """Give the buffers of the LoRA manager the rank of the active adapter. Applies once per process.

    Raises:
        RegistrationError: ``upstream_changed``.
    """
    if "lora_rank" in _installed:
        return
    require("lora_rank")
    from vllm_omni.diffusion.lora.manager import DiffusionLoRAManager

    from port_kit.runtime.lora_rank import with_rank_of_adapter

    bind = with_rank_of_adapter(DiffusionLoRAManager._bind_adapter_weights)
    DiffusionLoRAManager._bind_adapter_weights = bind  # type: ignore[method-assign]
    _installed.add("lora_rank")


def install_client_error_handling() -> None:
    """Keep the engine open after client errors. Applies once per process, if ``Omni`` is imported.

    Raises:
        RegistrationError: ``upstream_changed``.
    """
    module = sys.modules.get("vllm_omni.entrypoints.omni")
    if module is None or "refused_request" in _installed:
        return
    require("refused_request")
    from port_kit.runtime.error_mapping import keep_engine_on_client_error

    module.Omni.generate = keep_engine_on_client_error(module.Omni.generate)  # type: ignore[attr-defined]
    _installed.add("refused_request")


def name_damaged_indexes() -> None:
    """Make the error of a damaged ``model_index.json`` name the file. Applies once per process.

    A no-op if the module of vLLM-Omni that reads it is imported already, and in series that name the directory.

    Raises:
        RegistrationError: ``upstream_changed``.
    """
    if "damaged_index" in _installed or not is_needed("damaged_index"):
        return
    if "vllm_omni.diffusion.utils.hf_utils" in sys.modules:
        return
    require("damaged_index")
    from vllm.transformers_utils import config

    from port_kit.runtime.damaged_index import naming_the_file

    config.get_hf_file_to_dict = naming_the_file(config.get_hf_file_to_dict)
    _installed.add("damaged_index")


def declare_output_type(class_name: str, output_type: str) -> None:
    """Declare the output modality of a pipeline; other upstream metadata of the pipeline stay.

    Raises:
        RegistrationError: ``upstream_changed``.
    """
    require("output_type")
    from dataclasses import replace

    from vllm_omni.diffusion import model_metadata

    known = model_metadata._DIFFUSION_MODEL_METADATA
    entry = known.get(class_name, model_metadata.DiffusionModelMetadata())
    known[class_name] = replace(entry, final_output_type=output_type)
    _installed.add("output_type")


def declare_references(class_name: str, kinds: Collection[str], *, guides: bool = False) -> None:
    """Declare the reference media that ``/v1/videos`` accepts for a pipeline.

    Reference images keep their uploaded size. With both kinds, one form may contain image and audio files.

    Args:
        class_name: key of the pipeline in vLLM-Omni's registry.
        kinds: any of ``"image"`` and ``"audio"``; a no-op if empty.
        guides: True to accept timeline guides, too, if the server has them.

    Raises:
        RegistrationError: ``upstream_changed``.
    """
    if not kinds:
        return
    require("references")
    from dataclasses import replace

    from vllm_omni.diffusion import model_metadata
    from vllm_omni.model_extras import registry

    known = model_metadata._DIFFUSION_MODEL_METADATA
    entry = known.get(class_name, model_metadata.DiffusionModelMetadata())
    mixed = {"image", "audio"} <= set(kinds)
    mixed = mixed or entry.supports_mixed_reference_inputs
    known[class_name] = replace(entry, supports_mixed_reference_inputs=mixed, **timeline_guides(guides))
    if "image" in kinds:
        spec = {"reference_image_size_resolver": _keep_size, **registry._EXTRA_SPECS.get(class_name, {})}
        registry._EXTRA_SPECS[class_name] = spec
    _installed.add("references")


def _keep_size(*, model: str | None, revision: str | None = None) -> bool:
    """Return True: the pipeline resizes reference images itself. Parameters are upstream's."""
    return True


def map_malformed_form_errors() -> None:
    """Map two kinds of malformed requests to status 400. Applies once per process, if the endpoints are imported.

    Raises:
        RegistrationError: ``upstream_changed``.
    """
    helpers = sys.modules.get("vllm_omni.entrypoints.openai.video.generation.helpers")
    if helpers is None or "malformed_forms" in _installed:
        return
    require("malformed_forms")
    from vllm_omni.entrypoints.openai.protocol import videos

    from port_kit.runtime.error_mapping import as_client_error

    helpers._parse_form_json = as_client_error(helpers._parse_form_json, RecursionError, "JSON is nested too deeply")  # type: ignore[attr-defined]
    videos.parse_size = as_client_error(videos.parse_size, ValueError)
    _installed.add("malformed_forms")


def label_audio_results() -> None:
    """Give audio results the key that ``/v1/audio/generate`` reads the sample rate from. Applies once per process.

    A no-op for a series that reads the key of its own formatter.

    Raises:
        RegistrationError: ``upstream_changed``.
    """
    if "audio_sample_rate" in _installed or not is_needed("audio_sample_rate"):
        return
    require("audio_sample_rate")
    from vllm_omni.diffusion import output_formatter

    from port_kit.runtime.audio_rate import with_short_key

    formatted = with_short_key(output_formatter._format_audio_multimodal_output)
    output_formatter._format_audio_multimodal_output = formatted  # type: ignore[assignment]
    _installed.add("audio_sample_rate")
