"""The CPU as a vLLM-Omni platform, so that pipelines run where there is no accelerator.

vLLM-Omni supports accelerators only; its platform interface is open to others. "Devices" are processes here: the
number of ranks is bounded by memory, not by hardware. All numbers that describe memory are in bytes.
"""

from __future__ import annotations

import psutil
import torch
from vllm.platforms.cpu import CpuPlatform
from vllm_omni.platforms.interface import OmniPlatform, OmniPlatformEnum

from port_kit.errors import RegistrationError
from port_kit.runtime.patches import install_worker_fixes
from port_kit.runtime.upstream_checks import check_version, require

#: How many ranks may be asked for. A process is a device, so this only has to be more than anyone runs.
MAX_RANKS = 64

ATTENTION_BACKEND = "TORCH_SDPA"

check_version()
require("cpu_platform")


class CpuOmniPlatform(OmniPlatform, CpuPlatform):
    """vLLM's CPU platform with the diffusion part that vLLM-Omni asks of every platform."""

    _omni_enum = OmniPlatformEnum.OOT

    @classmethod
    def get_diffusion_worker_cls(cls) -> str:
        """Return the worker's class path, after putting in place what workers need on a CPU.

        vLLM-Omni asks once in every process that runs a worker, just before it builds the worker, and before
        the output thread starts or attention runs: the one place for the CPU fixes.
        """
        install_worker_fixes()
        return "vllm_omni.diffusion.worker.diffusion_worker.DiffusionWorker"

    @classmethod
    def get_diffusion_attn_backend_cls(
        cls, selected_backend: str | None, head_size: int, allow_trtllm_default: bool = False
    ) -> str:
        """Return the SDPA backend's class path.

        Raises:
            RegistrationError: another backend was asked for; its kernels need an accelerator.
        """
        if selected_backend is not None and selected_backend.upper() != ATTENTION_BACKEND:
            raise RegistrationError(
                f"attention backend {selected_backend!r} was asked for; a CPU runs {ATTENTION_BACKEND} only",
                code="attention_backend",
                hint=f"leave the backend out, or set it to {ATTENTION_BACKEND}",
                backend=selected_backend,
            )
        return "port_kit.runtime.attention.CpuSDPABackend"

    @classmethod
    def supports_torch_inductor(cls) -> bool:
        """Say no: compiling for a CPU takes longer than the small models that run here."""
        return False

    @classmethod
    def get_torch_device(cls, local_rank: int | None = None) -> torch.device:
        """Return the CPU, whatever the rank."""
        return torch.device("cpu")

    @classmethod
    def get_device_count(cls) -> int:
        """Return the number of ranks that may be asked for."""
        return MAX_RANKS

    @classmethod
    def get_device_version(cls) -> str | None:
        """Return None: there is no compute capability."""
        return None

    @classmethod
    def current_device(cls) -> int:
        """Return 0: all ranks share the one CPU."""
        return 0

    @classmethod
    def set_device(cls, device: torch.device) -> None:
        """Do nothing: there is one device."""

    @classmethod
    def synchronize(cls) -> None:
        """Do nothing: CPU operators return when they are done."""

    @classmethod
    def empty_cache(cls) -> None:
        """Do nothing: the CPU allocator keeps no cache that could be emptied."""

    @classmethod
    def get_free_memory(cls, device: torch.device | None = None) -> int:
        """Return the memory that can be had without swapping."""
        return psutil.virtual_memory().available

    @classmethod
    def get_device_memory(cls, device: torch.device | None = None) -> tuple[int, int]:
        """Return (available, total) memory."""
        memory = psutil.virtual_memory()
        return memory.available, memory.total

    @classmethod
    def mem_get_info(cls, device: torch.device | None = None) -> tuple[int, int]:
        """Return (available, total) memory, under the name that profiling code uses."""
        return cls.get_device_memory(device)

    @classmethod
    def reset_peak_memory_stats(cls, device: torch.device | None = None) -> None:
        """Do nothing: peaks are not tracked."""

    @classmethod
    def memory_allocated(cls, device: torch.device | None = None) -> int:
        """Return the resident memory of this process."""
        return psutil.Process().memory_info().rss

    @classmethod
    def max_memory_allocated(cls, device: torch.device | None = None) -> int:
        """Return the resident memory of this process; a CPU keeps no peak of its own."""
        return cls.memory_allocated(device)

    @classmethod
    def max_memory_reserved(cls, device: torch.device | None = None) -> int:
        """Return the resident memory of this process."""
        return cls.memory_allocated(device)
