"""Which changes of dtype keep every value."""

from __future__ import annotations

#: floating dtype -> (exponent bits, mantissa bits)
_FLOATS = {
    "float64": (11, 52),
    "float32": (8, 23),
    "bfloat16": (8, 7),
    "float16": (5, 10),
    "float8_e4m3fn": (4, 3),
    "float8_e5m2": (5, 2),
}
#: integer dtype -> (lowest, highest) as powers of two
_INTEGERS = {
    "bool": (0, 1),
    "uint8": (0, 8),
    "uint16": (0, 16),
    "uint32": (0, 32),
    "uint64": (0, 64),
    "int8": (7, 7),
    "int16": (15, 15),
    "int32": (31, 31),
    "int64": (63, 63),
}
_COMPLEX = {"complex64": "float32", "complex128": "float64"}


def keeps_values(source: str, target: str) -> bool:
    """Whether every value of ``source`` is one of ``target``, in the same kind of number."""
    if source == target:
        return True
    for table in (_FLOATS, _INTEGERS):
        if source in table and target in table:
            return all(one <= other for one, other in zip(table[source], table[target], strict=True))
    if source in _COMPLEX and target in _COMPLEX:
        return keeps_values(_COMPLEX[source], _COMPLEX[target])
    return False


def both_floating(source: str, target: str) -> bool:
    """Whether both are floating-point dtypes, so that a loss is rounding and nothing else."""
    return source in _FLOATS and target in _FLOATS
