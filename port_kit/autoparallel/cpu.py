"""Tiny instances of code that was written for GPUs, on a CPU.

Devices of CUDA stand for the CPU, dtypes that code names do not round float32, helpers that refuse a CPU are replaced
by ones that compute the same, and ``torch.compile`` does nothing. Only inference and proofs use this; plans that are
applied do not.
"""

from __future__ import annotations

import sys
import threading
import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from port_kit.autoparallel.attention_functions import recognize
from port_kit.autoparallel.attention_packages import flash_attention
from port_kit.autoparallel.observe import block_paths
from port_kit.autoparallel.subject import ModelScale, Subject
from port_kit.upstream.checks import require


def on_cpu(subject: Subject) -> Subject:
    """Return a subject whose module runs on a CPU."""
    warnings.filterwarnings("ignore", message="CUDA is not available")  # of autocast

    def build(scale: ModelScale) -> nn.Module:
        model = subject.build(scale)
        replace_gpu_helpers(model)
        for module in (model, *map(model.get_submodule, block_paths(model))):
            module.register_forward_pre_hook(_enter)
            module.register_forward_hook(_leave, always_call=True)
        return model

    return replace(subject, build=build)


def replace_gpu_helpers(model: nn.Module) -> None:
    """Replace attention helpers that refuse a CPU in the modules of a model's classes."""
    for name in {type(module).__module__ for module in model.modules()}:
        namespace = vars(sys.modules[name])
        for key, value in list(namespace.items()):
            if getattr(value, "__name__", "") == "flash_attention" and recognize(value) is not None:
                namespace[key] = flash_attention


class EagerStance:
    """Stance of torch.compile, which is that of the process, while any thread runs code within a mode."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entered = 0
        self._stance: Any = None

    def enter(self) -> None:
        """Let ``torch.compile`` do nothing."""
        with self._lock:
            self._entered += 1
            if self._entered == 1:
                self._stance = torch.compiler.set_stance("force_eager")

    def leave(self) -> None:
        """Restore the stance when the last one leaves."""
        with self._lock:
            self._entered -= 1
            if self._entered == 0:
                self._stance.__exit__(None, None, None)


_EAGER = EagerStance()


class GpuCode(TorchFunctionMode):
    """Mode of torch in which devices of CUDA stand for the CPU.

    Args:
        exact: dtypes of 16 bits that code names stand for float32, so that results can be compared.
    """

    def __init__(self, exact: bool) -> None:
        super().__init__()
        self.exact = exact

    def begin(self) -> None:
        """Enter the mode, and let ``torch.compile`` do nothing."""
        require("mode_stack")
        _EAGER.enter()
        self.__enter__()

    @staticmethod
    def end() -> None:
        """Leave the innermost mode."""
        torch.overrides._pop_mode()
        _EAGER.leave()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function with the CPU in place of CUDA."""
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0]
        if self.exact and func in _ROUNDING:
            return args[0].float()
        if not kwargs.keys().isdisjoint(("device", "dtype")):
            kwargs = {key: self._replaced(value) for key, value in kwargs.items()}
        if func is torch.Tensor.to:
            args = (args[0], *map(self._replaced, args[1:]))
        if func is scaled_dot_product_attention:
            with sdpa_kernel(_ON_CPU):  # code may allow kernels of GPUs only
                return func(*args, **kwargs)
        return func(*args, **kwargs)

    def _replaced(self, value: Any) -> Any:
        if isinstance(value, torch.dtype):
            return torch.float32 if self.exact and value in (torch.bfloat16, torch.float16) else value
        is_cuda = isinstance(value, (str, torch.device)) and str(value).partition(":")[0] == "cuda"
        return torch.device("cpu") if is_cuda else value


_ON_CPU = [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
_ROUNDING = (torch.Tensor.bfloat16, torch.Tensor.half)


def _enter(module: nn.Module, _args: Any) -> None:
    first = next(module.parameters(), None)
    GpuCode(exact=first is not None and first.dtype is torch.float32).begin()


def _leave(_module: nn.Module, _args: Any, _output: Any) -> None:
    GpuCode.end()
