"""Registered transforms: computations that no rearrangement can express, with their shape and inverse.

A transform is registered when its port is imported, and named in rules like any op::

    @transform("centre", shape=lambda parts, args: parts[""])
    def centre(parts, args):            # {"": tensor} -> tensor
        return parts[""] - parts[""].mean()

A transform with ``roles`` joins several sources: a rule's ``shard`` names the role of its source.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from port_kit.escape import quoted
from port_kit.regions import Shape
from port_kit.remap.problems import remap_error
from port_kit.upstream.checks import require

if TYPE_CHECKING:
    from torch import Tensor

Args = Mapping[str, Any]
Parts = Mapping[str, "Tensor"]
Forward = Callable[[Parts, Args], "Tensor"]
Inverse = Callable[["Tensor", Args, Mapping[str, Shape]], dict[str, "Tensor"]]
ShapeOf = Callable[[Mapping[str, Shape], Args], Shape]


@dataclass(frozen=True)
class Transform:
    """A registered transform.

    Attributes:
        name: its name in rules.
        forward: ``(parts, args) -> tensor``; ``parts`` is ``{"": tensor}`` or ``{role: tensor}``.
        shape: ``({role: shape}, args) -> shape`` of the result; runs without torch.
        inverse: ``(tensor, args, {role: shape}) -> parts``, or None if there is none.
        exact: ``inverse`` restores the same bits.
        roles: names of the sources of a joining transform; empty for a transform of one tensor.
        args: names of the arguments that rules may give.
    """

    name: str
    forward: Forward
    shape: ShapeOf
    inverse: Inverse | None = None
    exact: bool = False
    roles: tuple[str, ...] = ()
    args: tuple[str, ...] = ()

    def run(self, parts: Parts, args: Args, expected: Shape) -> Tensor:
        """Run forward.

        Raises:
            RemapError: ``remap_op`` if the result does not have the declared shape.
        """
        result = self.forward(parts, args)
        if tuple(result.shape) != tuple(expected):
            message = f"transform {self.name} failed: expected shape {list(expected)}, got {list(result.shape)}"
            raise remap_error("remap_op", message, "correct the transform's shape function")
        return result

    def undo(self, tensor: Tensor, args: Args, shapes: Mapping[str, Shape]) -> dict[str, Tensor]:
        """Run backwards.

        Raises:
            RemapError: ``remap_op`` if the transform declares no inverse.
        """
        if self.inverse is None:
            hint = "register it with inverse=..., or export without this tensor"
            raise remap_error("remap_op", f"transform {self.name} has no inverse", hint)
        return self.inverse(tensor, args, shapes)


_REGISTRY: dict[str, Transform] = {}


def transform(
    name: str,
    *,
    shape: ShapeOf,
    inverse: Inverse | None = None,
    exact: bool = False,
    roles: tuple[str, ...] = (),
    args: tuple[str, ...] = (),
) -> Callable[[Forward], Forward]:
    """Register a transform; see :class:`Transform` for the arguments.

    Raises:
        RemapError: ``remap_op`` if another function is registered under the name.
    """

    def register(forward: Forward) -> Forward:
        known = _REGISTRY.get(name)
        if known is not None and known.forward.__qualname__ != forward.__qualname__:
            raise remap_error("remap_op", f"two transforms are called {quoted(name)}", "rename one of them")
        _REGISTRY[name] = Transform(name, forward, shape, inverse, exact, roles, args)
        return forward

    return register


def find_transform(name: str) -> Transform:
    """Return the transform called ``name``.

    Raises:
        RemapError: ``remap_op`` if none is registered.
    """
    if name not in _REGISTRY:
        hint = f"registered transforms: {', '.join(sorted(_REGISTRY))}; a port registers its own when it is imported"
        raise remap_error("remap_op", f"no op or transform is called {quoted(name)}", hint)
    return _REGISTRY[name]


def _weight_norm_shape(parts: Mapping[str, Shape], args: Args) -> Shape:
    dim = args.get("dim", 0)
    direction, magnitude = parts["v"], parts["g"]
    expected = tuple(extent if axis == dim else 1 for axis, extent in enumerate(direction))
    if tuple(magnitude) != expected:
        message = f"weight_norm magnitude {list(magnitude)} for direction {list(direction)}: needs {list(expected)}"
        hint = "check dim: the axis of the direction that keeps its extent in the magnitude"
        raise remap_error("remap_shape", message, hint)
    return tuple(direction)


def _weight_norm_parts(weight: Tensor, args: Args, shapes: Mapping[str, Shape]) -> dict[str, Tensor]:
    """Return one of many possible pairs: the weight as direction, its norm as magnitude."""
    import torch

    norm = torch.norm_except_dim(weight, 2, args.get("dim", 0))
    return {"v": weight, "g": norm.reshape(shapes["g"])}


@transform("weight_norm", shape=_weight_norm_shape, inverse=_weight_norm_parts, roles=("g", "v"), args=("dim",))
def weight_norm(parts: Parts, args: Args) -> Tensor:
    """Fold ``g * v / |v|`` with the kernel of :func:`torch.nn.utils.weight_norm`, in float32 or wider.

    Half-precision storage is widened first: original implementations load it into float32 modules and fold there.
    """
    import torch

    require("weight_norm_kernel")
    v, g = (part if part.dtype == torch.float64 else part.float() for part in (parts["v"], parts["g"]))
    return torch._weight_norm(v, g, args.get("dim", 0))
