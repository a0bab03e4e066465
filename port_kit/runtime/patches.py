"""Every place where the kit changes upstream behaviour or leans on upstream's private parts, each with a guard.

``patches.md`` is the ledger for people: one section an entry of :data:`PATCHES`, under the same name. An entry lists
what it rests on; where upstream no longer is what the entry was written against, :func:`require` raises
:class:`~port_kit.errors.RegistrationError` instead of letting a patch meet code it does not know.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from port_kit.errors import RegistrationError

if TYPE_CHECKING:
    import torch

#: The vLLM-Omni series that the patches were proven on.
SERIES = "0.30"

_installed: set[str] = set()
_libraries: list[torch.library.Library] = []


@dataclass(frozen=True)
class Need:
    """One fact about upstream that a patch rests on.

    Attributes:
        kind: how the fact is read, a key of :data:`READERS`.
        target: what is read: ``"module:attribute.path"``, or an operator's name.
        expected: the values under which the patch is right.
    """

    kind: str
    target: str
    expected: tuple[str, ...]


@dataclass(frozen=True)
class Patch:
    """One entry of the ledger: its name there, one line, and what it rests on."""

    name: str
    summary: str
    needs: tuple[Need, ...]


PATCHES: dict[str, Patch] = {
    patch.name: patch
    for patch in (
        Patch(
            "cpu_platform",
            "a platform for CPUs through the platform interface",
            (
                Need("parameters", "vllm_omni.platforms.interface:OmniPlatform.get_diffusion_worker_cls", ("",)),
                Need(
                    "parameters",
                    "vllm_omni.platforms.interface:OmniPlatform.get_diffusion_attn_backend_cls",
                    ("selected_backend, head_size, allow_trtllm_default",),
                ),
            ),
        ),
        Patch(
            "sdpa_forward",
            "SDPA entered past the switch over accelerators",
            (
                Need(
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
                Need(
                    "source",
                    "vllm_omni.diffusion.worker.diffusion_worker:WorkerProc._async_output_loop",
                    ("a8b089e936400760",),
                ),
                Need(
                    "parameters",
                    "vllm_omni.diffusion.ipc:pack_diffusion_output_shm",
                    ("output, d2h_stream",),
                ),
            ),
        ),
        Patch(
            "ring_attention_kernel",
            "a CPU kernel for the operator that Ring attention calls",
            (
                Need(
                    "schema",
                    "aten::_scaled_dot_product_efficient_attention",
                    (
                        "(Tensor query, Tensor key, Tensor value, Tensor? attn_bias, bool compute_log_sumexp,"
                        " float dropout_p=0., bool is_causal=False, *, float? scale=None) -> (Tensor output,"
                        " Tensor log_sumexp, Tensor philox_seed, Tensor philox_offset)",
                    ),
                ),
                Need(
                    "schema",
                    "aten::_scaled_dot_product_flash_attention_for_cpu",
                    (
                        "(Tensor query, Tensor key, Tensor value, float dropout_p=0., bool is_causal=False,"
                        " *, Tensor? attn_mask=None, float? scale=None) -> (Tensor output, Tensor logsumexp)",
                    ),
                ),
                Need("cpu_kernel", "aten::_scaled_dot_product_efficient_attention", ("none",)),
            ),
        ),
        Patch(
            "output_type",
            "a port's modality declared where vLLM-Omni keeps those of its own models",
            (
                Need("type", "vllm_omni.diffusion.model_metadata:_DIFFUSION_MODEL_METADATA", ("dict",)),
                Need(
                    "annotation",
                    "vllm_omni.diffusion.model_metadata:DiffusionModelMetadata.final_output_type",
                    ("str | None",),
                ),
            ),
        ),
        Patch(
            "torchvision_schemas",
            "a CUDA-built torchvision importable beside a CPU-built torch",
            (Need("fakes", "torchvision", ("nms, qnms", "absent")),),
        ),
    )
}


def check_version() -> None:
    """Raise where the installed vLLM-Omni is not of the series that the kit was proven on."""
    from vllm_omni.version import __version__

    if __version__ != SERIES and not __version__.startswith(f"{SERIES}."):
        raise RegistrationError(
            f"vLLM-Omni {__version__} is installed; this port-kit was proven on {SERIES}.x",
            code="vllm_omni_version",
            hint=f"install 'vllm-omni>={SERIES},<0.31', or a port-kit made for {__version__}",
            found=__version__,
        )


def require(name: str) -> None:
    """Check all that the patch ``name`` rests on.

    Raises:
        RegistrationError: upstream has changed; names the patch, the target, what was expected and what was found.
    """
    for need in PATCHES[name].needs:
        found = _read(need)
        if found not in need.expected:
            raise RegistrationError(
                f"patch {name} was written against another {need.target}: its {need.kind} is {found!r},"
                f" expected {' or '.join(map(repr, need.expected))}",
                code="upstream_changed",
                hint=f"read the section {name} in port_kit/runtime/patches.md and adapt the patch or drop it",
                patch=name,
                target=need.target,
            )


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
    library.impl("_scaled_dot_product_efficient_attention", efficient_attention_cpu)
    _libraries.append(library)  # the registration ends when the library object does
    _installed.add("ring_attention_kernel")


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


def _read(need: Need) -> str:
    """Read one fact; an attribute, module or operator that is gone reads as ``missing``."""
    try:
        return READERS[need.kind](need.target)
    except (ImportError, AttributeError, KeyError, OSError, RuntimeError, TypeError) as error:
        return f"missing ({type(error).__name__}: {error})"


def _object(target: str) -> object:
    module, _, path = target.partition(":")
    found: object = importlib.import_module(module)
    for part in path.split("."):
        found = getattr(found, part)
    return found


def _parameters(target: str) -> str:
    function = _object(target)
    if not callable(function):
        raise TypeError(f"{target} cannot be called")
    return ", ".join(inspect.signature(function).parameters)


def _source(target: str) -> str:
    function = _object(target)
    if not inspect.isfunction(function):
        raise TypeError(f"{target} is not a Python function")
    return hashlib.sha256(inspect.getsource(function).encode()).hexdigest()[:16]


def _annotation(target: str) -> str:
    owner, _, field = target.rpartition(".")
    annotation = inspect.get_annotations(_class(owner))[field]
    return annotation if isinstance(annotation, str) else str(annotation)


def _class(target: str) -> type:
    found = _object(target)
    if not isinstance(found, type):
        raise TypeError(f"{target} is not a class")
    return found


def _schema(operator: str) -> str:
    import torch

    namespace, _, name = operator.partition("::")
    schema = getattr(getattr(torch.ops, namespace), name).default._schema
    return str(schema).removeprefix(operator)


def _cpu_kernel(operator: str) -> str:
    import torch

    if "ring_attention_kernel" in _installed:  # the one that is registered is the kit's
        return "none"
    return "registered" if torch._C._dispatch_has_kernel_for_dispatch_key(operator, "CPU") else "none"


def _fakes(package: str) -> str:
    from port_kit.runtime.startup import unbacked_operators

    return ", ".join(unbacked_operators()) or "absent"


READERS: dict[str, Callable[[str], str]] = {
    "annotation": _annotation,
    "cpu_kernel": _cpu_kernel,
    "fakes": _fakes,
    "parameters": _parameters,
    "schema": _schema,
    "source": _source,
    "type": lambda target: type(_object(target)).__name__,
}
