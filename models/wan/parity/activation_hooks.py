"""Forward hooks that capture intermediate values of the transformer under their original names.

Goldens record values under the original names (``vid.block0.self_attn``). :func:`record_activations` captures the same
values here, so that a comparison names the first module that diverges.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from port_kit.models.wan.transformer.config import FusionConfig

#: The original's names of the streams, and this transformer's.
STREAMS = {"vid": "video", "audio": "audio"}


@dataclass(frozen=True)
class ActivationHook:
    """One intermediate value.

    Attributes:
        name: of the value in the original implementation.
        module: path of the module of this transformer whose output holds it.
        read: returns the value, in the original's shape, from that output.
    """

    name: str
    module: str
    read: Callable[[Any], Tensor]


def activation_hooks(config: FusionConfig) -> list[ActivationHook]:
    """Return the intermediate values of a transformer, in the order in which they are computed."""
    found = []
    for stream, name in STREAMS.items():
        found += [
            ActivationHook(f"{stream}.tokens", f"{name}.patch_embedding", _as_is),
            ActivationHook(f"{stream}.context", f"{name}.text_embedding", _as_is),
            ActivationHook(f"{stream}.e_all", f"{name}.time_embedding", _first_and_last_token),
            ActivationHook(f"{stream}.e0_all", f"{name}.time_projection", _first_and_last_token),
        ]
    for index in range(config.num_layers):
        found += _block_hooks(index)
    return found + [ActivationHook(f"{stream}.head", f"{name}.head", _as_is) for stream, name in STREAMS.items()]


def _block_hooks(index: int) -> list[ActivationHook]:
    audio, video = f"blocks.{index}.audio", f"blocks.{index}.video"
    ours = (f"audio.block{index}", audio), (f"vid.block{index}", video)
    found = [ActivationHook(f"{name}.self_attn", f"{path}.self_attn.o", _as_is) for name, path in ours]
    for name, path in ours:
        found.append(ActivationHook(f"{name}.cross_attn", f"{path}.cross_attn.o", _as_is))
        found.append(ActivationHook(f"{name}.ffn", f"{path}.ffn.down", _as_is))
    found.append(ActivationHook(f"vid.block{index}.out", f"blocks.{index}", lambda output: output[0]))
    found.append(ActivationHook(f"audio.block{index}.out", f"blocks.{index}", lambda output: output[1]))
    return found


@contextmanager
def record_activations(transformer: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Capture the intermediate values of forward calls inside the context; a call overwrites those of earlier ones.

    Yields:
        A mapping that fills while the transformer runs, keyed by the original's names, in order of computation.
    """
    values: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for hook in activation_hooks(transformer.config):
            handle = transformer.get_submodule(hook.module).register_forward_hook(_make_hook(hook, values))
            stack.callback(handle.remove)
        yield values


def _make_hook(hook: ActivationHook, values: dict[str, Tensor]) -> Callable[[nn.Module, Any, Any], None]:
    def hook_fn(_module: nn.Module, _inputs: Any, output: Any) -> None:
        values[hook.name] = hook.read(output).detach()

    return hook_fn


def _as_is(output: Tensor) -> Tensor:
    return output


def _first_and_last_token(output: Tensor) -> Tensor:
    """Return the rows of the first and last token ``[B, 2, ...]`` from one row per timestep ``[G, B, ...]``."""
    return torch.stack((output[0], output[-1]), 1).flatten(2)
