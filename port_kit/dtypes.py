"""The table of dtypes: their names in torch, safetensors and pickles, their sizes and the values that they hold.

Names are torch's. Sizes and shapes are torch's, too: ``float4_e2m1fn_x2`` has two values per element of one byte, so a
safetensors tensor of dtype F4 and shape ``[8, 64]`` is one of shape ``[8, 32]`` here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


class FloatRange(NamedTuple):
    """The values of a floating-point dtype; exponents are those of two.

    Attributes:
        mantissa: explicit mantissa bits.
        smallest: exponent of the smallest positive value, subnormal values included.
        largest: exponent of the largest finite value.
        infinity: it has infinities.
    """

    mantissa: int
    smallest: int
    largest: int
    infinity: bool = True


class IntegerRange(NamedTuple):
    """The values of an integer dtype: ``bits`` of magnitude, and whether there are negative ones."""

    bits: int
    signed: bool


class Dtype(NamedTuple):
    """One dtype.

    Attributes:
        name: torch's name.
        word: its word in safetensors headers, empty if that format cannot hold it.
        itemsize: bytes per element.
        packed: values per element. Torch casts no dtype that packs several.
        floats: the values of a floating-point dtype.
        integers: those of an integer dtype.
        part: of a complex dtype, that of its real part.
        storage: the class of its typed storage in pickles, empty if pickles write untyped storages.
    """

    name: str
    word: str
    itemsize: int
    packed: int = 1
    floats: FloatRange | None = None
    integers: IntegerRange | None = None
    part: str = ""
    storage: str = ""


_TABLE = (
    Dtype("float64", "F64", 8, floats=FloatRange(52, -1074, 1023), storage="DoubleStorage"),
    Dtype("float32", "F32", 4, floats=FloatRange(23, -149, 127), storage="FloatStorage"),
    Dtype("float16", "F16", 2, floats=FloatRange(10, -24, 15), storage="HalfStorage"),
    Dtype("bfloat16", "BF16", 2, floats=FloatRange(7, -133, 127), storage="BFloat16Storage"),
    Dtype("float8_e4m3fn", "F8_E4M3", 1, floats=FloatRange(3, -9, 8, infinity=False)),
    Dtype("float8_e5m2", "F8_E5M2", 1, floats=FloatRange(2, -16, 15)),
    Dtype("float8_e4m3fnuz", "F8_E4M3FNUZ", 1, floats=FloatRange(3, -10, 7, infinity=False)),
    Dtype("float8_e5m2fnuz", "F8_E5M2FNUZ", 1, floats=FloatRange(2, -17, 15, infinity=False)),
    Dtype("float8_e8m0fnu", "F8_E8M0", 1, floats=FloatRange(0, -127, 127, infinity=False)),
    Dtype("float4_e2m1fn_x2", "F4", 1, packed=2),
    Dtype("int64", "I64", 8, integers=IntegerRange(63, True), storage="LongStorage"),
    Dtype("int32", "I32", 4, integers=IntegerRange(31, True), storage="IntStorage"),
    Dtype("int16", "I16", 2, integers=IntegerRange(15, True), storage="ShortStorage"),
    Dtype("int8", "I8", 1, integers=IntegerRange(7, True), storage="CharStorage"),
    Dtype("uint64", "U64", 8, integers=IntegerRange(64, False)),
    Dtype("uint32", "U32", 4, integers=IntegerRange(32, False)),
    Dtype("uint16", "U16", 2, integers=IntegerRange(16, False)),
    Dtype("uint8", "U8", 1, integers=IntegerRange(8, False), storage="ByteStorage"),
    Dtype("bool", "BOOL", 1, integers=IntegerRange(1, False), storage="BoolStorage"),
    Dtype("complex64", "C64", 8, part="float32", storage="ComplexFloatStorage"),
    Dtype("complex128", "", 16, part="float64", storage="ComplexDoubleStorage"),
)
#: By torch's name.
DTYPES = {dtype.name: dtype for dtype in _TABLE}
#: By the word of safetensors headers.
BY_WORD = {dtype.word: dtype for dtype in _TABLE if dtype.word}
#: Bytes per element, by torch's name.
ITEM_SIZES = {dtype.name: dtype.itemsize for dtype in _TABLE}


def torch_shape(dtype: Dtype, values: Iterable[int]) -> tuple[int, ...]:
    """Return the shape in elements, as torch counts, of a shape in values, as safetensors headers do.

    Raises:
        ValueError: the last axis is no multiple of the values per element.
    """
    shape = tuple(values)
    if dtype.packed == 1:
        return shape
    if not shape or shape[-1] % dtype.packed:
        raise ValueError(f"{dtype.word} packs {dtype.packed} values per byte along the last axis, shape {list(shape)}")
    return (*shape[:-1], shape[-1] // dtype.packed)


def header_shape(dtype: Dtype, elements: Iterable[int]) -> list[int]:
    """Return the shape in values, as safetensors headers count, of a shape in elements, as torch does.

    Raises:
        ValueError: a tensor of no axes cannot be counted so.
    """
    shape = list(elements)
    if dtype.packed == 1:
        return shape
    if not shape:
        raise ValueError(f"{dtype.name} of shape [] has no axis along which its {dtype.packed} values could be counted")
    return [*shape[:-1], shape[-1] * dtype.packed]


def keeps_values(source: str, target: str) -> bool:
    """Return True if every value of ``source`` is one of ``target``, in the same kind of number."""
    if source == target:
        return True
    one, other = DTYPES.get(source), DTYPES.get(target)
    if one is None or other is None:
        return False
    if one.floats and other.floats:
        a, b = one.floats, other.floats
        fits = a.mantissa <= b.mantissa and b.smallest <= a.smallest and a.largest <= b.largest
        return fits and a.infinity <= b.infinity
    if one.integers and other.integers:
        return one.integers.bits <= other.integers.bits and one.integers.signed <= other.integers.signed
    return bool(one.part and other.part) and keeps_values(one.part, other.part)


def both_floating(source: str, target: str) -> bool:
    """Return True if both are floating-point dtypes that can be cast, so that a loss is rounding or overflow."""
    return all(name in DTYPES and DTYPES[name].floats is not None for name in (source, target))


def overflows(result: Tensor, source: Tensor) -> bool:
    """Return True if a finite value of a tensor is not finite, or clamped, in the tensor cast from it."""
    import torch

    narrow = result.dtype.itemsize == 1
    if not result.numel() or not narrow and all_finite(result):
        return False
    values = source.double().abs()
    lost = ~torch.isfinite(result.float() if narrow else result)
    if narrow:  # casts to some float8 dtypes clamp
        limit = torch.finfo(result.dtype)
        lost |= values > limit.max + 2.0 ** (math.frexp(limit.max)[1] - 2) * limit.eps  # half of the last step
    return bool((lost & torch.isfinite(values)).any())


def all_finite(tensor: Tensor) -> bool:
    """Return True if a tensor has neither infinities nor NaNs."""
    import torch

    if not tensor.numel():
        return True
    lowest, highest = torch.aminmax(tensor)  # without allocation; a NaN results in NaN
    return bool(torch.isfinite(lowest) & torch.isfinite(highest))
