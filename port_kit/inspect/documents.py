"""Small text files of a listing, cached; unreadable files are recorded as findings."""

from __future__ import annotations

import json
from typing import Any

from port_kit.escape import reason_of
from port_kit.inspect.file_listing import FileListing
from port_kit.inspect.report import Finding

_LONGEST = 1 << 26  # an index of a hundred thousand tensors has ten megabytes


class Documents:
    """Cached reader of the text and JSON files of a listing.

    Attributes:
        problems: files that exist but cannot be read, in reading order.
    """

    def __init__(self, listing: FileListing) -> None:
        self.listing = listing
        self.problems: list[Finding] = []
        self._objects: dict[str, dict[str, Any]] = {}

    def content(self, path: str) -> bytes:
        """Return a file's bytes; empty if it is not there, too large, or gated."""
        size = self.listing.files.get(path, 0)
        if size > _LONGEST:
            self.problems.append(Finding(path, f"has {size} bytes, too many for a text"))
        if not size or size > _LONGEST or self.listing.gate:
            return b""
        with self.listing.open(path) as source:
            return source.read_at(0, size)

    def text(self, path: str) -> str:
        """Return a file's text; bytes that are no UTF-8 are replaced, as these texts are only displayed."""
        return self.content(path).decode("utf-8", "replace")

    def object(self, path: str) -> dict[str, Any]:
        """Return a JSON object; empty if the file is not there or is none."""
        if path not in self._objects:
            self._objects[path] = self._read(path)
        return self._objects[path]

    def _read(self, path: str) -> dict[str, Any]:
        if path not in self.listing.files or self.listing.gate:
            return {}
        try:
            value = json.loads(self.content(path))
        except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, brackets without end
            self.problems.append(Finding(path, f"is no JSON: {reason_of(error)}"))
            return {}
        if not isinstance(value, dict):
            self.problems.append(Finding(path, f"holds a {type(value).__name__}, not an object"))
            return {}
        return value
