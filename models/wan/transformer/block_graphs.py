"""CUDA graphs of all blocks of the fusion transformer, for the branches of one call."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from vllm.lora.layers import BaseLayerWithLoRA

from port_kit.models.wan.transformer.attention import RotaryContext
from port_kit.models.wan.transformer.block import FusionBlock
from port_kit.models.wan.transformer.modality_io import StreamConditioning, TextContext
from port_kit.parallel.cuda_graphs import Constant, GraphCache

if TYPE_CHECKING:
    from port_kit.models.wan.transformer.model import ForwardContext, Pair

#: Runs branches through all blocks and replaces their tokens.
RunBlocks = Callable[["list[Pair]", "Sequence[ForwardContext]"], None]

#: Inputs of one branch: tokens, modulation and rotary table, each of the video and of the audio.
BRANCH_INPUTS = 6


class BlockGraphs:
    """Runs all blocks as one CUDA graph.

    Texts are projected before the graph, once per request. Embedding, output heads and the collectives at the
    boundaries of sequence parallelism stay outside.

    Args:
        blocks: of the transformer.
        device: their device.
    """

    def __init__(self, blocks: nn.ModuleList, device: torch.device) -> None:
        self.blocks = blocks
        self.cache = GraphCache(device)

    def is_usable(self) -> bool:
        """Return False if a LoRA was inserted: it can change from call to call."""
        return not any(isinstance(module, BaseLayerWithLoRA) for module in self.blocks.modules())

    def run(self, states: list[Pair], contexts: Sequence[ForwardContext], run_blocks: RunBlocks) -> None:
        """Run branches through all blocks; replace their tokens in ``states``.

        Args:
            states: tokens of each branch; the results are overwritten by the next call.
            contexts: the other arguments of each branch.
            run_blocks: the same without a graph.
        """
        for block in self._blocks():
            for context, tokens in zip(contexts, states, strict=True):
                block.project_texts(context.block_inputs(tokens))
        texts = _distinct_texts(contexts)
        order = [[texts.index(conditioning.text) for conditioning in context.conditioning] for context in contexts]

        def run_on(inputs: Sequence[Tensor], constants: Sequence[Sequence[Tensor]]) -> list[Tensor]:
            own = [_text_of(tensors) for tensors in constants]
            tokens, rebuilt = [], []
            for index, context in enumerate(contexts):
                v, a, *rest = inputs[index * BRANCH_INPUTS :][:BRANCH_INPUTS]
                tokens.append((v, a))
                rebuilt.append(_rebuild(context, rest, [own[place] for place in order[index]]))
            run_blocks(tokens, rebuilt)
            return [x for pair in tokens for x in pair]

        kind = tuple(_static(context, places) for context, places in zip(contexts, order, strict=True))
        inputs = [x for pair, context in zip(states, contexts, strict=True) for x in _inputs(pair, context)]
        constants = [Constant(text, list(self._keys_values(text, contexts))) for text in texts]
        flat = self.cache.call(kind, run_on, inputs, constants)
        states[:] = [(flat[2 * index], flat[2 * index + 1]) for index in range(len(contexts))]

    def _blocks(self) -> Iterator[FusionBlock]:
        for block in self.blocks:
            assert isinstance(block, FusionBlock)
            yield block

    def _keys_values(self, text: TextContext, contexts: Sequence[ForwardContext]) -> Iterator[Tensor]:
        is_video = any(context.conditioning[0].text is text for context in contexts)
        for block in self._blocks():
            yield from (block.video if is_video else block.audio).text_keys_values(text)


def _distinct_texts(contexts: Sequence[ForwardContext]) -> list[TextContext]:
    found: list[TextContext] = []
    for context in contexts:
        for conditioning in context.conditioning:
            if not any(conditioning.text is text for text in found):
                found.append(conditioning.text)
    return found


def _text_of(keys_values: Sequence[Tensor]) -> TextContext:
    """Return a text whose keys and values of all layers are known."""
    text = TextContext(keys_values[0])
    text.keys_values = {
        layer: (keys_values[2 * layer], keys_values[2 * layer + 1]) for layer in range(len(keys_values) // 2)
    }
    return text


def _inputs(tokens: Pair, context: ForwardContext) -> list[Tensor]:
    video, audio = context.conditioning
    return [*tokens, video.modulation, audio.modulation, video.rotary.rope, audio.rotary.rope]


def _rebuild(context: ForwardContext, tensors: Sequence[Tensor], texts: Sequence[TextContext]) -> ForwardContext:
    v_modulation, a_modulation, v_rope, a_rope = tensors
    video, audio = context.conditioning
    return replace(
        context,
        conditioning=(_with(video, v_modulation, v_rope, texts[0]), _with(audio, a_modulation, a_rope, texts[1])),
    )


def _with(given: StreamConditioning, modulation: Tensor, rope: Tensor, text: TextContext) -> StreamConditioning:
    return replace(given, modulation=modulation, rotary=RotaryContext(rope, given.rotary.length), text=text)


def _static(context: ForwardContext, texts: Sequence[int]) -> Hashable:
    """Return all that the blocks depend on beside tensors."""
    streams = tuple((given.timestep_segments, given.rotary.length) for given in context.conditioning)
    return streams, context.inputs.skip_layers, context.inputs.unused, tuple(texts)
