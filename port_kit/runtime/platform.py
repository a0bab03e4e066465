"""CPU platform for vLLM-Omni.

vLLM-Omni's platform interface is public, but it only ships accelerators. Each rank is a process; memory bounds their
number. All memory sizes are in bytes.
"""

from __future__ import annotations

import psutil
import torch
from vllm.platforms.cpu import CpuPlatform
from vllm_omni.platforms.interface import OmniPlatform, OmniPlatformEnum

from port_kit.errors import RegistrationError
from port_kit.escape import quoted
from port_kit.runtime.patches import install_worker_fixes
from port_kit.upstream.checks import require
from port_kit.upstream.series import check_version

#: Upper bound of the number of ranks.
MAX_RANKS = 64

ATTENTION_BACKEND = "TORCH_SDPA"

check_version()
require("cpu_platform")


class CpuOmniPlatform(OmniPlatform, CpuPlatform):
    """vLLM's CPU platform with the methods that vLLM-Omni requires of a diffusion platform."""

    _omni_enum = OmniPlatformEnum.OOT

    @classmethod
    def get_diffusion_worker_cls(cls) -> str:
        """Return the worker's class path after applying the CPU worker patches.

        vLLM-Omni calls this once per worker process, before the worker is built and its output thread starts.
        """
        install_worker_fixes()
        return "vllm_omni.diffusion.worker.diffusion_worker.DiffusionWorker"

    @classmethod
    def get_diffusion_attn_backend_cls(
        cls, selected_backend: str | None, head_size: int, allow_trtllm_default: bool = False
    ) -> str:
        """Return the SDPA backend's class path.

        Raises:
            RegistrationError: ``attention_backend``; the selected backend needs an accelerator.
        """
        if selected_backend is not None and selected_backend.upper() != ATTENTION_BACKEND:
            raise RegistrationError(
                f"Attention backend on a CPU: expected {ATTENTION_BACKEND}, got {quoted(selected_backend)}.",
                code="attention_backend",
                hint=f"remove the backend option, or set it to {ATTENTION_BACKEND}",
                backend=selected_backend,
            )
        return "port_kit.runtime.attention.CpuSDPABackend"

    @classmethod
    def supports_torch_inductor(cls) -> bool:
        """Return False: compilation takes longer than running the small models of a CPU."""
        return False

    @classmethod
    def get_torch_device(cls, local_rank: int | None = None) -> torch.device:
        """Return the CPU."""
        return torch.device("cpu")

    @classmethod
    def get_device_count(cls) -> int:
        """Return the upper bound of the number of ranks."""
        return MAX_RANKS

    @classmethod
    def get_device_version(cls) -> str | None:
        """Return None: there is no compute capability."""
        return None

    @classmethod
    def current_device(cls) -> int:
        """Return 0: all ranks share one CPU."""
        return 0

    @classmethod
    def set_device(cls, device: torch.device) -> None:
        """Do nothing: a CPU is the only device."""

    @classmethod
    def synchronize(cls) -> None:
        """Do nothing: CPU operators are synchronous."""

    @classmethod
    def empty_cache(cls) -> None:
        """Do nothing: the CPU allocator has no cache."""

    @classmethod
    def get_free_memory(cls, device: torch.device | None = None) -> int:
        """Return the memory that is available without swapping."""
        return psutil.virtual_memory().available

    @classmethod
    def get_device_memory(cls, device: torch.device | None = None) -> tuple[int, int]:
        """Return (available, total) memory."""
        memory = psutil.virtual_memory()
        return memory.available, memory.total

    @classmethod
    def mem_get_info(cls, device: torch.device | None = None) -> tuple[int, int]:
        """Return (available, total) memory; the name that profiling code uses."""
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
        """Return the resident memory of this process; peaks are not tracked."""
        return cls.memory_allocated(device)

    @classmethod
    def max_memory_reserved(cls, device: torch.device | None = None) -> int:
        """Return the resident memory of this process."""
        return cls.memory_allocated(device)
