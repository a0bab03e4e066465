"""The table of dtypes, compared with torch and with the safetensors library; dtypes that it lacks are named."""

from __future__ import annotations

import itertools
import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from port_kit.checkpoint.convert import convert_file
from port_kit.dtypes import DTYPES, both_floating, keeps_values
from port_kit.errors import PortKitError
from port_kit.manifest import Manifest

FLOATS = [name for name, dtype in DTYPES.items() if dtype.floats]
INTEGERS = [name for name, dtype in DTYPES.items() if dtype.integers]


def bytes_as(dtype: str, shape: tuple[int, ...] = (4,)) -> torch.Tensor:
    """A tensor whose bytes count up."""
    size = DTYPES[dtype].itemsize
    count = torch.arange(torch.Size(shape).numel() * size, dtype=torch.uint8) % (2 if dtype == "bool" else 128)
    return count.view(getattr(torch, dtype)).reshape(shape)


def write_header(path: Path, **tensors: tuple[str, list[int], int]) -> Path:
    """A safetensors file of zeros from ``name=(dtype, shape, bytes)``."""
    header, end = {}, 0
    for name, (dtype, shape, size) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(end))
    return path


def every_value(dtype: str) -> torch.Tensor:
    """All values of a dtype of one or two bytes; of a wider one those at the ends of its range and precision."""
    kind = getattr(torch, dtype)
    if kind.itemsize <= 2:
        return torch.arange(256**kind.itemsize).to([torch.uint8, torch.uint16][kind.itemsize - 1]).view(kind)
    info = torch.finfo(kind)
    return torch.tensor([1 + info.eps, info.max, info.smallest_normal * info.eps, torch.inf], dtype=kind)


@pytest.mark.parametrize(("source", "target"), list(itertools.product(FLOATS, FLOATS)))
def test_float_dtypes_keep_values_exactly_if_torch_does(source: str, target: str) -> None:
    values = every_value(source)
    wide = values.to(torch.float64)
    back = (values if "float64" in (source, target) else values.float()).to(getattr(torch, target)).to(torch.float64)
    assert keeps_values(source, target) == torch.allclose(wide, back, rtol=0, atol=0, equal_nan=True)
    assert both_floating(source, target)


@pytest.mark.parametrize(("source", "target"), list(itertools.product(INTEGERS, INTEGERS)))
def test_integer_dtypes_keep_values_by_range(source: str, target: str) -> None:
    def ends(name: str) -> tuple[int, int]:
        info = torch.iinfo(getattr(torch, name)) if name != "bool" else None
        return (info.min, info.max) if info else (0, 1)

    (low, high), (lowest, highest) = ends(source), ends(target)
    assert keeps_values(source, target) == (lowest <= low and high <= highest)


def test_kinds_of_numbers_are_not_mixed() -> None:
    assert keeps_values("complex64", "complex128") and not keeps_values("complex128", "complex64")
    assert not keeps_values("int8", "float32") and not keeps_values("float32", "complex64")
    assert keeps_values("float4_e2m1fn_x2", "float4_e2m1fn_x2")
    assert not keeps_values("float4_e2m1fn_x2", "float32") and not both_floating("float4_e2m1fn_x2", "float32")


@pytest.mark.parametrize("dtype", DTYPES)
def test_pickle_conversion_and_header_agree_with_the_libraries(tmp_path: Path, dtype: str) -> None:
    """For every dtype: the manifests of the pickle and of the converted file, and the bytes that safetensors reads."""
    tensor = bytes_as(dtype, (2, 4))
    assert tensor.element_size() == DTYPES[dtype].itemsize
    source, target = tmp_path / "net.pth", tmp_path / "net.safetensors"
    torch.save({"scale": tensor, "turned": tensor.t()}, source)
    expected = {"scale": ((2, 4), dtype), "turned": ((4, 2), dtype)}
    assert {name: (spec.shape, spec.dtype) for name, spec in Manifest.from_checkpoint(source).items()} == expected
    if not DTYPES[dtype].word:
        with pytest.raises(PortKitError) as caught:
            convert_file(source, target)
        assert caught.value.code == "pickle_unsupported" and dtype in caught.value.message
        return
    convert_file(source, target)
    manifest = Manifest.from_checkpoint(target)
    assert {name: (spec.shape, spec.dtype) for name, spec in manifest.items()} == expected
    assert manifest.nbytes == 2 * 8 * tensor.element_size()
    loaded = load_file(target)
    assert loaded["scale"].dtype == tensor.dtype
    for name, value in (("scale", tensor), ("turned", tensor.t().contiguous())):
        assert torch.equal(loaded[name].view(torch.uint8), value.view(torch.uint8)), name
    save_file({"scale": tensor}, target)
    assert Manifest.from_checkpoint(target)["scale"] == manifest["scale"]


@pytest.mark.parametrize(
    ("word", "shape", "size"),
    [("F6_E2M3", [4], 3), ("C128", [1], 16), ("Q9", [1], 1), ("", [1], 1), ("F4", [3], 2), ("F4", [], 1)],
)
def test_dtypes_that_cannot_be_read_are_named_with_the_tensor(
    tmp_path: Path, word: str, shape: list[int], size: int
) -> None:
    path = write_header(tmp_path / "net.safetensors", good=("F32", [1], 4), scale=(word, shape, size))
    with pytest.raises(PortKitError) as caught:
        Manifest.from_checkpoint(path)
    assert caught.value.code == "manifest_invalid"
    assert "'scale'" in caught.value.message and word in caught.value.message and "'good'" not in caught.value.message


@pytest.mark.parametrize("shape", [[True, 2], [2, 2.0], ["2"], [-2], None, 4])
def test_packed_shapes_are_checked_like_others(tmp_path: Path, shape: object) -> None:
    path = write_header(tmp_path / "net.safetensors", scale=("F4", shape, 2))  # type: ignore[arg-type]
    with pytest.raises(PortKitError) as caught:
        Manifest.from_checkpoint(path)
    assert caught.value.code == "manifest_invalid"


@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_tensors_of_other_dtypes_are_named(tmp_path: Path) -> None:
    torch.save({"good": torch.ones(2), "odd": torch.ones(2, dtype=torch.complex32)}, tmp_path / "net.pth")
    with pytest.raises(PortKitError) as caught:
        Manifest.from_checkpoint(tmp_path / "net.pth")
    assert caught.value.code == "pickle_unsupported"
    assert "odd" in caught.value.message and "complex32" in caught.value.message
    module = torch.nn.Module()
    module.register_buffer("odd", torch.ones(2, dtype=torch.complex32))
    with pytest.raises(PortKitError) as caught:
        Manifest.from_module(module)
    assert caught.value.code == "manifest_invalid" and "'odd'" in caught.value.message
