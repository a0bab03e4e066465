"""Reader of GGUF headers: metadata and tensor table, by offset."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from port_kit.checkpoint.byte_sources import ByteSource
from port_kit.errors import CheckpointError
from port_kit.escape import quoted

#: Types of metadata values: name of the struct format; 8 is a string and 9 an array.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
#: Types of tensors: torch's name if torch has the type, otherwise the name that GGUF tools print.
_DTYPES = {
    0: "float32",
    1: "float16",
    2: "q4_0",
    3: "q4_1",
    6: "q5_0",
    7: "q5_1",
    8: "q8_0",
    9: "q8_1",
    10: "q2_k",
    11: "q3_k",
    12: "q4_k",
    13: "q5_k",
    14: "q6_k",
    15: "q8_k",
    16: "iq2_xxs",
    17: "iq2_xs",
    18: "iq3_xxs",
    19: "iq1_s",
    20: "iq4_nl",
    21: "iq3_s",
    22: "iq2_s",
    23: "iq4_xs",
    24: "int8",
    25: "int16",
    26: "int32",
    27: "int64",
    28: "float64",
    29: "iq1_m",
    30: "bfloat16",
}
_PIECE = 1 << 20
_MOST = 1_000_000
_LONGEST_TEXT = 1 << 24
_MOST_DIMENSIONS = 8


@dataclass(frozen=True)
class GgufHeader:
    """``entries``: shapes (torch's order) and dtypes by tensor name; ``metadata``: the scalar values."""

    entries: dict[str, tuple[tuple[int, ...], str]]
    metadata: dict[str, str]


def read_gguf(source: ByteSource) -> GgufHeader:
    """Read the header of GGUF version 2 or 3.

    Raises:
        CheckpointError: ``checkpoint_format`` for another format or version, ``checkpoint_corrupt`` if it is cut
            short or its counts cannot be.
    """
    reader = _Reader(source)
    if reader.take(4) != b"GGUF":
        raise CheckpointError(f"{source.name} does not begin with GGUF", code="checkpoint_format")
    version = reader.number("I")
    if version not in (2, 3):
        raise CheckpointError(f"{source.name} is GGUF version {version}; 2 and 3 are read", code="checkpoint_format")
    tensors, values = reader.count(), reader.count()
    metadata = dict(reader.pair() for _ in range(values))
    entries = dict(reader.tensor() for _ in range(tensors))
    return GgufHeader(entries, {key: value for key, value in metadata.items() if value})


class _Reader:
    """Reads the format's values one after another."""

    def __init__(self, source: ByteSource) -> None:
        self._source, self._name = source, source.name
        self._offset = 0
        self._buffer, self._start = b"", 0  # the last bytes read, and the offset of the next value

    def take(self, length: int) -> bytes:
        """Return exactly so many bytes; the source is asked for a large piece at a time, as each may be a request."""
        if self._start + length > len(self._buffer):
            self._offset += self._start
            self._buffer, self._start = self._source.read_at(self._offset, max(length, _PIECE)), 0
        data = self._buffer[self._start : self._start + length]
        if len(data) != length:
            raise self._corrupt(f"ends at byte {self._source.size}, within its header")
        self._start += length
        return data

    def number(self, form: str) -> int:
        """Return one number of a struct format."""
        return struct.unpack(f"<{form}", self.take(struct.calcsize(f"<{form}")))[0]

    def count(self) -> int:
        """Return a number of things that follow."""
        count = self.number("Q")
        if count > _MOST:
            raise self._corrupt(f"claims {count} entries")
        return count

    def text(self) -> str:
        """Return a string."""
        length = self.number("Q")
        if length > _LONGEST_TEXT:
            raise self._corrupt(f"claims a text of {length} bytes")
        return self.take(length).decode("utf-8", "replace")

    def pair(self) -> tuple[str, str]:
        """Return one entry of the metadata; arrays (vocabularies) are stepped over and come as an empty string."""
        key, kind = self.text(), self.number("I")
        return key, self.value(kind)

    def value(self, kind: int) -> str:
        """Return a value as text."""
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            inner, count = self.number("I"), self.count()
            for _ in range(count):
                self.value(inner)
            return ""
        if kind not in _SCALARS:
            raise self._corrupt(f"has a value of the unknown type {kind}")
        return str(self.number(_SCALARS[kind]))

    def tensor(self) -> tuple[str, tuple[tuple[int, ...], str]]:
        """Return one entry of the tensor table. GGUF lists the fastest axis first, torch last."""
        name, dimensions = self.text(), self.number("I")
        if dimensions > _MOST_DIMENSIONS:
            raise self._corrupt(f"gives {quoted(name)} {dimensions} axes")
        shape = tuple(reversed([self.number("Q") for _ in range(dimensions)]))
        kind = self.number("I")
        self.number("Q")  # offset of its data
        return name, (shape, _DTYPES.get(kind, f"ggml_{kind}"))

    def _corrupt(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self._name} {what}", code="checkpoint_corrupt", hint="fetch the file again")
