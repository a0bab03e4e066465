"""A goldens folder: checkpoints in the original's layout, recorded tensors, and bounds for comparisons with them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from port_kit.errors import ParityError
from port_kit.models.mova.recipe import FOLDERS
from port_kit.models.mova.weights import COMPONENTS
from port_kit.parity import Bound, Pair
from port_kit.port import resolve
from port_kit.remap import load_local

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
#: Factor on a recorded rounding error; two independent roundings of size g are about 1.41 g apart.
GAPS = 1.5
#: Smallest bound from a rounding error: a value that the original does not round differs in the order of its sums.
LEAST_GAP = 2e-6


@dataclass(frozen=True)
class Goldens:
    """A goldens folder.

    Attributes:
        folder: its path.
        checkpoint: a repository in the original's layout.
    """

    folder: Path
    checkpoint: Path

    @classmethod
    def open(cls, folder: Path) -> Goldens:
        """Find the checkpoint of a folder.

        Raises:
            ParityError: the folder has none, or several.
        """
        found = [path.parent for path in sorted(folder.glob("ckpts/*/model_index.json"))]
        if len(found) != 1:
            raise ParityError(
                f"{folder} has {len(found)} checkpoints below ckpts/; expected one",
                code="goldens_invalid",
                hint="give the folder with SET.json, ckpts/ and one folder per component",
            )
        return cls(folder, found[0])

    def tensors(self, path: str) -> dict[str, Tensor]:
        """Return the tensors of a file, by its path without suffix; none if there is no such file."""
        file = self.folder / f"{path}.safetensors"
        return load_file(file) if file.is_file() else {}

    def json(self, path: str) -> Any:
        """Return the content of a JSON file, by its path.

        Raises:
            ParityError: there is no such file.
        """
        file = self.folder / path
        if not file.is_file():
            raise ParityError(f"{file} is missing", code="goldens_invalid", hint="record the goldens again")
        return json.loads(file.read_text(encoding="utf-8"))

    def component(self, source: str, *, changes: Mapping[str, Any] | None = None) -> Any:
        """Build a component on the current default dtype, and load its checkpoint.

        Args:
            source: folder in the original's layout.
            changes: replace values of its configuration.
        """
        folder = self.checkpoint / source
        component = next(each for each in COMPONENTS if each.name == FOLDERS[source])
        build: Any = resolve(component.build)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        module: nn.Module = build({**config, **(changes or {})})
        rules: Any = resolve(component.rules)
        load_local(module, folder, rules)
        return module.eval()


def compare(
    name: str, actual: Tensor, exact: Mapping[str, Tensor], rounded: Mapping[str, Tensor] | None, bound: Bound
) -> Iterator[Pair]:
    """Pair a tensor with the recorded ones of its name, if there are any.

    Args:
        name: of the value.
        actual: computed here, in float32 or rounded.
        exact: recorded in float32.
        rounded: recorded in bfloat16; None to compare float32. A rounded tensor may differ from both by
            :data:`GAPS` times the distance between them.
        bound: of float32.
    """
    if name not in exact:
        return
    if rounded is None:
        yield Pair(name, actual, exact[name], bound)
    elif name in rounded:
        limit = rounding_bound(exact[name], rounded[name])
        yield Pair(f"{name} to fp32", actual, exact[name], limit)
        yield Pair(f"{name} to bf16", actual, rounded[name], limit)


def rounding_bound(exact: Tensor, rounded: Tensor) -> Bound:
    """Return a bound from the original's own rounding error."""
    reference = exact.double()
    gap = ((rounded.double() - reference).norm() / reference.norm()).item()
    return Bound(rel_l2=max(GAPS * gap, LEAST_GAP), why=f"{GAPS} times the original's {gap:.2e}")
