"""True conversions of further model families, derived on the meta device, to measure ``suggest`` on.

A family (``families/*.toml``) is a small real module, whose names and shapes are one side, and the original's naming as
ordered substitutions on those names. Marks in a substituted name say what the conversion does besides renaming:
``@k``: the tensor is the k-th part of a fused one; ``~swap``: its halves change places; ``~T``: it is transposed;
``~11``: the original is a 1x1 convolution. Where diffusers ships the conversion, :func:`verify` runs it on tensors of
unique numbers and demands that the written truth gives the same tensors.
"""

from __future__ import annotations

import importlib
import re
import tomllib
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Shape = tuple[int, ...]
Entry = dict[str, Any]
FOLDER = Path(__file__).parent / "families"


@dataclass(frozen=True)
class Conversion:
    """Names and shapes of both sides, and the sources of every target, in the schema of the tests' conversions."""

    name: str
    source: dict[str, Shape]
    target: dict[str, Shape]
    map: dict[str, Entry]
    developed_on: bool = True
    dropped: tuple[str, ...] = field(default=())


def load_families() -> list[Conversion]:
    """All families, both ways where every entry of the map has a way back."""
    forward = [conversion(path) for path in sorted(FOLDER.glob("*.toml"))]
    backward = [inverse(one) for one in forward if not one.name.endswith("_back")]
    return forward + [one for one in backward if one is not None]


def conversion(path: Path) -> Conversion:
    """Derive one family from its file."""
    data = tomllib.loads(path.read_text())
    target = {name: tuple(tensor.shape) for name, tensor in build(data).state_dict().items()}
    prefix = data.get("prefix", "")
    parts: dict[str, dict[int, tuple[str, Shape]]] = defaultdict(dict)
    truth: dict[str, Entry] = {}
    source: dict[str, Shape] = {}
    for name, shape in target.items():
        whole, part, marks = _original(name, data["source_names"])
        if part is None:
            truth[name], source[prefix + whole] = _single(prefix + whole, shape, marks)
        else:
            parts[prefix + whole][part] = (name, (*shape, 1, 1) if "11" in marks else shape)
    for whole, members in parts.items():
        source[whole] = (sum(shape[0] for _, shape in members.values()), *members[0][1][1:])
        truth.update(_splits(whole, [members[at] for at in sorted(members)], target))
    dropped = {prefix + name: tuple(shape) for name, shape in data.get("dropped", {}).items()}
    made = Conversion(path.stem, source | dropped, target, truth, data["developed_on"], tuple(dropped))
    if not data.get("inverted"):
        return made
    turned = inverse(made, name=path.stem)
    assert turned is not None, f"{path.stem} has no way back"
    return turned


def build(data: dict[str, Any]) -> Any:
    """Make the module of a family on the meta device."""
    import torch

    library = importlib.import_module(data["library"])
    made = getattr(library, data["module"])
    with torch.device("meta"):
        if "config_class" in data:
            return made(getattr(library, data["config_class"])(**data["config"]))
        return made(**data["config"])


def _original(name: str, substitutions: list[list[str]]) -> tuple[str, int | None, set[str]]:
    """The source name of a tensor, the part of it that the tensor is, and the marks."""
    for pattern, replacement in substitutions:
        name = re.sub(pattern, replacement, name)
    marks = set(re.findall(r"~(\w+?)(?=[.~@]|$)", name))
    name = re.sub(r"~\w+?(?=[.~@]|$)", "", name)
    part = re.search(r"@(\d)", name)
    return (name.replace(part[0], ""), int(part[1]), marks) if part else (name, None, marks)


def _single(whole: str, shape: Shape, marks: set[str]) -> tuple[Entry, Shape]:
    if "swap" in marks:
        half = shape[0] // 2
        return {"from": [whole], "op": "reorder", "detail": {"dim": 0, "runs": [[half, shape[0]], [0, half]]}}, shape
    if "T" in marks and len(shape) == 2:
        return {"from": [whole], "op": "transpose", "detail": {"perm": [1, 0]}}, shape[::-1]
    if "11" in marks:
        return {"from": [whole], "op": "reshape", "detail": {"shape": list(shape)}}, (*shape, 1, 1)
    return {"from": [whole], "op": "copy", "detail": {}}, shape


def _splits(whole: str, members: list[tuple[str, Shape]], target: dict[str, Shape]) -> dict[str, Entry]:
    found, start = {}, 0
    for name, shape in members:
        detail: dict[str, Any] = {"dim": 0, "start": start, "stop": start + shape[0]}
        if shape != target[name]:
            detail["reshape"] = list(target[name])
        found[name] = {"from": [whole], "op": "split", "detail": detail}
        start += shape[0]
    return found


def inverse(one: Conversion, name: str = "") -> Conversion | None:
    """The conversion the other way; None where an entry has no single way back in the schema."""
    users: dict[str, list[tuple[str, Entry]]] = defaultdict(list)
    for target, entry in one.map.items():
        for source in entry["from"]:
            users[source].append((target, entry))
    entries = {source: _back(uses, one.source[source]) for source, uses in users.items()}
    if any(entry is None for entry in entries.values()):
        return None
    target = {source: one.source[source] for source in users}
    made = {source: entry for source, entry in entries.items() if entry is not None}
    return Conversion(name or f"{one.name}_back", dict(one.target), target, made, one.developed_on)


def _back(uses: list[tuple[str, Entry]], shape: Shape) -> Entry | None:
    target, entry = uses[0]
    if len(uses) == 1 and entry["op"] in ("copy", "transpose", "reorder"):
        return {"from": [target], "op": entry["op"], "detail": entry["detail"]}
    if len(uses) == 1 and entry["op"] == "reshape":
        return {"from": [target], "op": "reshape", "detail": {"shape": list(shape)}}
    if entry["op"] != "split" or "reshape" in entry["detail"]:
        return None
    names = [name for name, _ in sorted(uses, key=lambda use: use[1]["detail"]["start"])]
    parts = [{"source": name, "start": None, "stop": None} for name in names]
    return {"from": names, "op": "concat", "detail": {"dim": 0, "parts": parts}}


def verify(path: Path) -> bool | None:
    """Whether diffusers' own conversion gives what the written truth says; None where it ships none."""
    import torch
    from diffusers.loaders import single_file_utils

    function = tomllib.loads(path.read_text()).get("function")
    if not function:
        return None
    one = conversion(path)
    given, start = {}, 0
    for name, shape in one.source.items():
        count = torch.Size(shape).numel()
        given[name] = torch.arange(start, start + count).reshape(shape)
        start += count
    made = getattr(single_file_utils, function)(dict(given))
    return set(made) == set(one.target) and all(
        torch.equal(made[name], replay(entry, given)) for name, entry in one.map.items()
    )


def replay(entry: Entry, given: dict[str, Any]) -> Any:
    """Run one entry (of those that families have) on tensors."""
    import torch

    tensor, detail = given[entry["from"][0]], entry["detail"]
    if entry["op"] == "split":
        tensor = tensor[detail["start"] : detail["stop"]]
        return tensor.reshape(detail["reshape"]) if "reshape" in detail else tensor
    if entry["op"] == "reorder":
        return torch.cat([tensor[start:stop] for start, stop in detail["runs"]])
    if entry["op"] == "transpose":
        return tensor.permute(detail["perm"])
    return tensor.reshape(detail["shape"]) if entry["op"] == "reshape" else tensor
