"""Record goldens of Tidepool: inputs, the output, and the outputs of blocks of the original implementation.

python -I record_goldens.py --original original --model MODEL --output GOLDENS

It runs in an environment of the original implementation, with torch and safetensors; port_kit is not imported.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

#: Frames, rows and columns of the video: 3 x 5 x 7 tokens, which no two ranks can share evenly.
VIDEO = (3, 40, 56)
PROMPT = "a crab walks over wet sand"
SEED = 7


def build(folder: Path) -> nn.Module:
    """Build the original model with the weights of a model directory's component; its names are the original ones."""
    from tidepool_original import Tidepool  # type: ignore[import-not-found]

    model: nn.Module = Tidepool(**json.loads((folder / "config.json").read_text(encoding="utf-8")))
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    return model.eval().requires_grad_(False)


def compared_modules(model: nn.Module) -> list[str]:
    """Return the names of the modules whose outputs are recorded: each block, and the parts of it."""
    names = ["patch", "time"]
    for index in range(len(model.get_submodule("layers"))):  # type: ignore[arg-type]
        names += [f"layers.{index}.attn", f"layers.{index}.mlp", f"layers.{index}"]
    return [*names, "final"]


def record(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """Run the model once; return the outputs of its modules, in the order of the forward pass, and its output."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda _module, _inputs, output: outputs.__setitem__(name, output.detach().clone())

    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in compared_modules(model)]
    result: Tensor = model(**inputs)
    for handle in handles:
        handle.remove()
    return outputs, result


def main() -> None:
    """Read the command line, run the original, and write the folder; ``SET.json`` is written last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--original", type=Path, required=True, help="folder of the original code")
    parser.add_argument("--model", type=Path, required=True, help="model directory")
    parser.add_argument("--output", type=Path, required=True, help="folder of the goldens")
    given = parser.parse_args()
    sys.path.insert(0, str(given.original))
    random = torch.Generator().manual_seed(SEED)
    inputs = {
        "video": torch.randn((1, 3, *VIDEO), generator=random),
        "time": torch.tensor([0.3]),
        "prompt": torch.tensor([list(PROMPT.encode())]),
    }
    outputs, result = record(build(given.model / "transformer"), inputs)
    folder = given.output / "transformer"
    folder.mkdir(parents=True, exist_ok=True)
    save_file(inputs, folder / "inputs.safetensors")
    save_file({name: value.contiguous() for name, value in outputs.items()}, folder / "intermediates_fp32.safetensors")
    save_file({"velocity": result.contiguous()}, folder / "outputs_fp32.safetensors")
    contents = {"model": str(given.model.resolve()), "modules": list(outputs)}
    (given.output / "SET.json").write_text(json.dumps(contents, indent=1), encoding="utf-8")
    print(f"{given.output}: {len(outputs)} modules recorded")


if __name__ == "__main__":
    main()
