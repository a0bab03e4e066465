"""The patches of upstream behaviour, each applied behind its guard.

What they are for is in ``patches.md``, what they rest on in :mod:`port_kit.runtime.patch_registry`.
"""

from __future__ import annotations

import sys
from collections.abc import Collection
from typing import TYPE_CHECKING

from port_kit.runtime.upstream_checks import OWN_KERNELS, require

if TYPE_CHECKING:
    import torch

_RING_OPERATOR = "aten::_scaled_dot_product_efficient_attention"

_installed: set[str] = set()
_libraries: list[torch.library.Library] = []


def installed() -> list[str]:
    """Return the names of the patches that are in force in this process, sorted."""
    return sorted(_installed)


def install_worker_fixes() -> None:
    """Put the two worker fixes in place, once a process.

    Raises:
        RegistrationError: upstream has changed under one of them.
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
    _libraries.append(library)  # the registration ends when the library object does
    OWN_KERNELS.add(_RING_OPERATOR)
    _installed.add("ring_attention_kernel")


def install_client_error_handling() -> None:
    """Let ``Omni.generate`` survive a refused request, once a process, in processes that have ``Omni`` loaded.

    Raises:
        RegistrationError: upstream's method is another one now.
    """
    module = sys.modules.get("vllm_omni.entrypoints.omni")
    if module is None or "refused_request" in _installed:
        return
    require("refused_request")
    from port_kit.runtime.error_mapping import keep_engine_on_client_error

    module.Omni.generate = keep_engine_on_client_error(module.Omni.generate)  # type: ignore[attr-defined]
    _installed.add("refused_request")


def declare_output_type(class_name: str, output_type: str) -> None:
    """Declare what the pipeline ``class_name`` puts out; other facts that upstream holds on it stay.

    Raises:
        RegistrationError: upstream keeps modalities elsewhere now.
    """
    require("output_type")
    from dataclasses import replace

    from vllm_omni.diffusion import model_metadata

    known = model_metadata._DIFFUSION_MODEL_METADATA
    entry = known.get(class_name, model_metadata.DiffusionModelMetadata())
    known[class_name] = replace(entry, final_output_type=output_type)
    _installed.add("output_type")


def declare_references(class_name: str, kinds: Collection[str]) -> None:
    """Declare which reference media requests to the pipeline ``class_name`` may hold, for ``/v1/videos``.

    A pipeline that reads pictures gets them as they were uploaded, and one that reads pictures and sounds may be sent
    both as files of one form.

    Args:
        class_name: the key under which the pipeline is registered.
        kinds: of ``"image"`` and ``"audio"``; empty declares nothing.

    Raises:
        RegistrationError: upstream keeps these facts elsewhere now.
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
    known[class_name] = replace(entry, supports_mixed_reference_inputs=mixed or entry.supports_mixed_reference_inputs)
    if "image" in kinds:
        spec = {"reference_image_size_resolver": _keep_size, **registry._EXTRA_SPECS.get(class_name, {})}
        registry._EXTRA_SPECS[class_name] = spec
    _installed.add("references")


def _keep_size(*, model: str | None, revision: str | None = None) -> bool:
    """Say that the pipeline fits reference pictures itself; the parameters are upstream's."""
    return True


def map_malformed_form_errors() -> None:
    """Answer two kinds of malformed requests with 400, once a process, in processes that have the endpoints loaded.

    Raises:
        RegistrationError: upstream's functions are other ones now.
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
