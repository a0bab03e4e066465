"""Detect files and folders in unsupported formats, with a remedy for each."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from port_kit.checkpoint.byte_sources import ByteSource
from port_kit.errors import CheckpointError

SAFETENSORS_SUFFIX = ".safetensors"
PICKLE_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt")
#: Largest safetensors header that is read; the format's own limit.
MAX_HEADER = 100_000_000
#: Files that trainers save with weights: state that no pipeline loads.
LEFTOVERS = ("optimizer", "scheduler", "training_args", "random_states", "rng_state", "scaler")


class Container(NamedTuple):
    """An unsupported format: its description, the remedy, and how it is recognized.

    Attributes:
        what: end of the sentence "this file ...".
        hint: the remedy.
        suffixes: of paths.
        magic: ``(offset, bytes)`` of contents.
    """

    what: str
    hint: str
    suffixes: tuple[str, ...] = ()
    magic: tuple[tuple[int, bytes], ...] = ()


_FETCH = "fetch the file again"
_UNPACK = "unpack it and name the checkpoint inside"
_NUMPY = "read its arrays with {} and save them with safetensors.numpy.save_file"
_DCP = Container(
    "is a checkpoint of torch.distributed.checkpoint (DCP)",
    "join it: python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER model.pt; then name model.pt",
    (".distcp", "/.metadata"),
)
_NPZ = Container("is a NumPy archive (npz)", _NUMPY.format("numpy.load"), (".npz",))
_KERAS = Container("is a Keras archive", _NUMPY.format("keras.saving.load_model"), (".keras",))
_CONTAINERS = (
    Container(
        "is an HTML page, probably a server's error message",
        _FETCH,
        magic=((0, b"<!doctype"), (0, b"<html"), (0, b"<?xml")),
    ),
    Container(
        "is a Git LFS pointer; the content was never fetched",
        "fetch it with git lfs pull",
        magic=((0, b"version https://git-lfs.github.com"),),
    ),
    Container(
        "is a GGUF file: tensors of llama.cpp's names, mostly quantized",
        "name the safetensors or torch checkpoint that it was made from; port-kit inspect lists its tensors",
        (".gguf",),
        ((0, b"GGUF"),),
    ),
    _DCP,
    Container("is a NumPy array", _NUMPY.format("numpy.load"), (".npy",), ((0, b"\x93NUMPY"),)),
    _NPZ,
    Container("is an HDF5 file", _NUMPY.format("h5py"), (".h5", ".hdf5"), ((0, b"\x89HDF\r\n\x1a\n"),)),
    _KERAS,
    Container("is an ONNX graph", "name the checkpoint that it was exported from", (".onnx", ".onnx_data")),
    Container(
        "is a Flax checkpoint (msgpack)",
        "read it with flax.serialization.msgpack_restore and save it with safetensors.flax.save_file",
        (".msgpack",),
    ),
    Container("is a TFLite model", "name the checkpoint that it was converted from", (".tflite",), ((4, b"TFL3"),)),
    Container("is a TensorFlow graph", "name the checkpoint that it was exported from", (".pb",)),
    Container("is a Core ML model", "name the checkpoint that it was converted from", (".mlmodel",)),
    Container("is a TensorRT engine", "name the checkpoint that it was built from", (".engine", ".plan")),
    Container("is a tar archive", _UNPACK, (".tar", ".nemo"), ((257, b"ustar"),)),
    Container("is gzip-compressed", _UNPACK, (".gz", ".tgz"), ((0, b"\x1f\x8b"),)),
    Container("is a Zstandard archive", _UNPACK, (".zst",), ((0, b"\x28\xb5\x2f\xfd"),)),
    Container("is a 7z archive", _UNPACK, (".7z",), ((0, b"7z\xbc\xaf\x27\x1c"),)),
    Container("is an xz archive", _UNPACK, (".xz",), ((0, b"\xfd7zXZ\x00"),)),
    Container("is JSON text", _FETCH, magic=((0, b"{"), (0, b"["))),
)


def looks_like_safetensors(source: ByteSource) -> bool:
    """Return True if a file begins with the length of a JSON object that fits into it."""
    head = source.read_at(0, 9)
    length = int.from_bytes(head[:8], "little")
    return head[8:9] == b"{" and 2 <= length <= min(MAX_HEADER, source.size - 8)


def looks_like_torch(source: ByteSource) -> bool:
    """Return True if a file starts like output of torch.save: a zip archive or a pickle."""
    head = source.read_at(0, 4)
    return head == b"PK\x03\x04" or head[:1] == b"\x80"


def refuse_foreign(source: ByteSource) -> None:
    """Raise if a file is of a format that is known and not read.

    Raises:
        CheckpointError: ``checkpoint_format`` with the detected format and the remedy.
    """
    if looks_like_safetensors(source):
        return
    head = source.read_at(0, 512)
    text = head.lstrip()[:64].lower()
    for container in _CONTAINERS:
        for at, magic in container.magic:
            if head[at : at + len(magic)] == magic or (at == 0 and text.startswith(magic)):
                raise _foreign(source.name, container)
    refuse_foreign_name(source.name)


def refuse_foreign_name(name: str) -> None:
    """Raise the same for a file that is known by its name."""
    path = "/" + name.replace("\\", "/").lower()
    for container in _CONTAINERS:
        if path.endswith(container.suffixes):
            raise _foreign(name, container)


def refuse_dcp(folder: str, names: Iterable[str]) -> None:
    """Raise the same for a folder whose files are a checkpoint of torch.distributed.checkpoint."""
    if any(f"/{name}".endswith(_DCP.suffixes) for name in names):
        raise _foreign(folder, _DCP)


def describe_zip(names: Iterable[str]) -> Container:
    """Describe a zip archive without data.pkl by the names of its entries."""
    listed = list(names)
    if listed and all(name.endswith(".npy") for name in listed):
        return _NPZ
    if "model.weights.h5" in listed:
        return _KERAS
    shown = ", ".join(listed[:4]) or "nothing"
    return Container(f"is a zip archive without data.pkl; it holds {shown}", _UNPACK)


def _foreign(name: str, container: Container) -> CheckpointError:
    return CheckpointError(
        f"{name} {container.what}; a safetensors file or a torch checkpoint is required",
        code="checkpoint_format",
        hint=container.hint,
    )
