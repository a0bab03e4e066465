"""Admission of a request's LoRA: everything that can be wrong with it is an error on arrival.

vLLM-Omni's LoRA manager identifies an adapter by a number that the client chooses. Here the number is replaced by one
of the content and the scale, so that two files never share an adapter.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from port_kit.errors import InputError
from port_kit.escape import quoted, reason_of
from port_kit.pipeline.inputs import check_real
from port_kit.runtime.lora_files import bad_file, find_files
from port_kit.runtime.lora_sets import MAX_SCALE, read_set

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

#: Adapters whose content is remembered.
_REMEMBERED = 256


class AdapterAdmission:
    """Checks of the adapters of an engine's requests.

    Args:
        read: reads an adapter for the model and raises InputError or RemapError if it does not fit.
    """

    def __init__(self, read: Callable[[Path], object]) -> None:
        self._read = read
        self._known: OrderedDict[tuple[object, ...], bytes] = OrderedDict()

    def admit(self, sampling: Any) -> None:
        """Check ``lora_request`` and ``lora_scale``; the adapter's number becomes that of its content and scale.

        Raises:
            InputError: ``lora_file``, ``source_missing``, ``input_value``, ``input_type``; the adapter cannot be used.
            RemapError: a module of the adapter does not exist in this model.
        """
        scale = check_real("lora_scale", sampling.lora_scale, minimum=-MAX_SCALE, maximum=MAX_SCALE)
        request = sampling.lora_request
        if request is None:
            if scale != 1.0:
                raise InputError(
                    f"lora_scale is {scale:g} and there is no LoRA", code="input_value", hint="leave lora_scale out"
                )
            return
        digest = self._digest(self._path(request))
        number = int.from_bytes(hashlib.blake2b(digest + repr(scale).encode(), digest_size=7).digest(), "big")
        sampling.lora_request = self._numbered(request, number or 1)

    @staticmethod
    def _path(request: LoRARequest) -> Path:
        try:
            path = Path(str(request.lora_path)).expanduser().absolute()
            if path.exists():
                return path
        except (OSError, ValueError, RuntimeError):  # too long, NUL, or no such home
            pass
        raise InputError(
            f"the LoRA {quoted(str(request.lora_path))} does not exist",
            code="source_missing",
            hint="give the path of a file or folder on this machine",
        )

    def _digest(self, path: Path) -> bytes:
        """Return the digest of an adapter's files, which fit the model, or of those of a set with their scales."""
        members = read_set(path)
        if members is None:
            return self._digest_of_one(path)
        digests = tuple(self._digest_of_one(member) for member, _ in members)
        if digests not in self._known:  # the ranks add up, whatever the scales are
            self._read(path)
            self._remember(digests, b"")
        scales = repr([scale for _, scale in members]).encode()
        return hashlib.blake2b(b"".join(digests) + scales).digest()

    def _digest_of_one(self, path: Path) -> bytes:
        try:
            files = find_files(path).paths
            key = tuple((file, (stat := file.stat()).st_ino, stat.st_size, stat.st_mtime_ns) for file in files)
            if key not in self._known:
                self._read(path)
                digest = hashlib.blake2b()
                for file in files:
                    with file.open("rb") as opened:
                        digest.update(hashlib.file_digest(opened, hashlib.blake2b).digest())
                self._remember(key, digest.digest())
        except OSError as error:
            raise bad_file(path, f"it cannot be read: {reason_of(error)}") from error
        self._known.move_to_end(key)
        return self._known[key]

    def _remember(self, key: tuple[object, ...], digest: bytes) -> None:
        self._known[key] = digest
        while len(self._known) > _REMEMBERED:
            self._known.popitem(last=False)

    @staticmethod
    def _numbered(request: LoRARequest, number: int) -> LoRARequest:
        return type(request)(lora_name=str(request.lora_name), lora_int_id=number, lora_path=request.lora_path)
