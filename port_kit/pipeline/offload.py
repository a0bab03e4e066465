"""Offload of whole components: weights that wait in host memory are pinned when the engine starts.

vLLM-Omni's own offload leaves weights as the loader made them, and pins a component's memory when it first leaves the
device. For transformers, that is during the first requests.
"""

from __future__ import annotations

import torch
from torch import nn
from vllm_omni.diffusion.offloader import (
    OffloadConfig,
    OffloadStrategy,
    apply_sequential_offload,
    remove_sequential_offload,
    resolve_offload_plan,
    sequential_offload_component,
)

from port_kit.upstream.checks import require


class PinnedOffload(nn.Module):
    """Pipeline that vLLM-Omni asks to set up ``enable_cpu_offload``: it has the methods of its protocol.

    The hooks are vLLM-Omni's: a transformer excludes encoders and other transformers from the device, an encoder
    excludes transformers. VAEs and partners of transformers stay on the device.
    """

    def enable_omni_model_cpu_offload(
        self,
        *,
        device: torch.device,
        pin_memory: bool,
        use_hsdp: bool,
        offload_components: frozenset[str] | None = None,
    ) -> None:
        """Add the hooks, then send each component that may wait to the device and back to host memory.

        The way back pins the memory, which later moves reuse. The hooks apply: no two transformers are on the device.

        Args:
            device: where components run.
            pin_memory: False leaves components where the loader put them until they are called.
            use_hsdp: shards are not pinned.
            offload_components: vLLM-Omni's names of what may wait; None for transformers and encoders.
        """
        require("component_offload")
        config = OffloadConfig(
            OffloadStrategy.MODEL_LEVEL, pin_cpu_memory=pin_memory, use_hsdp=use_hsdp, components=offload_components
        )
        plan = resolve_offload_plan(self, config)
        transformers, encoders = ([part.module for part in parts] for parts in (plan.dits, plan.encoders))
        waiting = [[part.module for part in parts if part.selected] for parts in (plan.dits, plan.encoders)]
        for part in (*plan.encoders, *plan.vaes, *plan.residents):
            if not part.selected:
                part.module.to(device)
        apply_sequential_offload(
            transformers,
            encoders,
            device,
            pin_memory=pin_memory,
            use_hsdp=use_hsdp,
            offload_dit_modules=waiting[0],
            offload_encoder_modules=waiting[1],
        )
        if pin_memory and not use_hsdp:
            for module in (*waiting[0], *waiting[1]):
                with sequential_offload_component(module):
                    pass

    def disable_omni_model_cpu_offload(self) -> None:
        """Remove the hooks; weights stay where they are."""
        remove_sequential_offload([*self.children()])
