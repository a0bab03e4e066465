"""The skeleton's transformer as names and shapes, in the sizes that a checkpoint seems to have."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

from port_kit.manifest import Manifest, TensorSpec

_INDEX = re.compile(r"\.(\d+)\.")


def skeleton_target(checkpoint: Manifest) -> Manifest:
    """Return the target that ``rules suggest`` is given for a checkpoint that nobody has ported yet.

    The width is the extent that most matrices read, the number of blocks the longest run of indices, the hidden width
    the most frequent larger extent that goes back to the width.
    """
    matrices = [spec.shape for _, spec in checkpoint.items() if len(spec.shape) == 2]
    width = _most((shape[1] for shape in matrices), 64)
    hidden = _most((shape[1] for shape in matrices if shape[0] == width and shape[1] > width), 4 * width)
    layers = 1 + max((int(number) for name, _ in checkpoint.items() for number in _INDEX.findall(name)), default=0)
    dtype = next((spec.dtype for _, spec in checkpoint.items()), "float32")
    shapes = dict(_top(width)) | {
        f"blocks.{index}.{name}": shape for index in range(layers) for name, shape in _block(width, hidden)
    }
    return Manifest({name: TensorSpec(shape, dtype) for name, shape in shapes.items()}, origin="skeleton")


def _most(extents: Iterator[int], default: int) -> int:
    counted = Counter(extents).most_common(1)
    return counted[0][0] if counted else default


def _linear(name: str, outputs: int, inputs: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (outputs, inputs)
    yield f"{name}.bias", (outputs,)


def _top(width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    for name in ("time_up", "time_down"):
        yield from _linear(name, width, width)
    yield from (("norm.weight", (width,)), ("norm.bias", (width,)))


def _block(width: int, hidden: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    for name, outputs, inputs in (
        ("self_attn.qkv", 3 * width, width),
        ("self_attn.o", width, width),
        ("cross_attn.q", width, width),
        ("cross_attn.kv", 2 * width, width),
        ("cross_attn.o", width, width),
        ("up", hidden, width),
        ("down", width, hidden),
    ):
        yield from _linear(name, outputs, inputs)
    for name in ("norm1", "norm2", "norm3"):
        yield from ((f"{name}.weight", (width,)), (f"{name}.bias", (width,)))
