"""Record components of an original implementation: ``python -I run_modules.py REQUEST.json``.

A script of :class:`~port_kit.parity.OriginalImplementation` for models whose parts can be called by themselves. It
runs in the original's environment and must not import port_kit. The options are data::

    {
        "components": {
            "transformer": {
                "build": "their_package.net:Denoiser",
                "prefix": "module.",
                "inputs": {"x": {"normal": [1, 8, 45]}, "t": [0.3], "words": {"integers": [1, 7], "below": 256}},
                "modules": {"layers.*.attn": "blocks.*.attn.o", "layers.*": "blocks.*", "head": "head"}
            }
        },
        "pipeline": {
            "call": "their_package.sampling:sample",
            "arguments": {"net": "transformer", "codec": "decoder", "z": "noise", "caption": "prompt", "n": "steps"},
            "values": {"noise": {"normal": [1, 8, 45]}, "prompt": "rain", "steps": 2, "guidance_scale": 3.0},
            "returns": "output"
        }
    }

``build`` is called with the component's ``config.json`` as keywords; ``prefix`` is in front of the names in the
checkpoint. ``inputs`` are passed by position, in their order. ``modules`` maps modules of the original to modules of
the port with the same outputs; ``*`` is one part of a name. The outputs of those of the original are recorded; of a
tuple it is the first tensor. ``pipeline`` may be left out; its ``arguments`` name components and values. Values that
the port's pipeline reads are ``noise``, ``image`` (uint8, of shape [H, W, 3]), ``prompt``, ``negative_prompt``,
``steps`` and ``guidance_scale``. ``returns`` is ``latents`` for a function that does not decode.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main(request: Mapping[str, Any]) -> None:
    """Run every component, then the pipeline, and write the goldens folder; ``SET.json`` is written last."""
    sys.path[:0] = request["path"]
    output, model = Path(request["output"]), Path(request["model"])
    device = "cuda" if request["device"] == "auto" and torch.cuda.is_available() else request["device"]
    place = {"device": "cpu" if device == "auto" else device, "dtype": DTYPES[request["precision"]]}
    random = torch.Generator().manual_seed(request["seed"])
    contents: dict[str, Any] = {"model": str(model), "components": {}}
    modules: dict[str, nn.Module] = {}
    for name, case in request["components"].items():
        modules[name] = load_component(model / name, case["build"], case.get("prefix", "")).to(**place)
        inputs = {key: tensor(value, random, place) for key, value in case["inputs"].items()}
        pairs = counterparts(modules[name], case.get("modules", {}))
        outputs, result = run_component(modules[name], list(inputs.values()), pairs)
        write(output / name, request["precision"], inputs, result, outputs)
        contents["components"][name] = {"inputs": list(inputs), "modules": {key: pairs[key] for key in outputs}}
    if "pipeline" in request:
        case = request["pipeline"]
        values = {key: value_of(value, random, place) for key, value in case["values"].items()}
        given = {**modules, **values}
        with torch.no_grad():
            result = find(case["call"])(**{key: given[name] for key, name in case["arguments"].items()})
        tensors = {key: value for key, value in values.items() if isinstance(value, Tensor)}
        write(output / "pipeline", request["precision"], tensors, result, {})
        known = {key: value for key, value in values.items() if key not in tensors}
        contents["pipeline"] = {**known, "returns": case.get("returns", "output")}
    (output / "SET.json").write_text(json.dumps(contents, indent=1), encoding="utf-8")


def load_component(folder: Path, build: str, prefix: str) -> nn.Module:
    """Build a component of the original code, and fill it with the weights of a model directory."""
    state: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        state |= {name.removeprefix(prefix): value for name, value in load_file(path).items()}
    module: nn.Module = find(build)(**json.loads((folder / "config.json").read_text(encoding="utf-8")))
    module.load_state_dict(state, strict=True)
    return module.eval().requires_grad_(False)


def counterparts(module: nn.Module, patterns: Mapping[str, str]) -> dict[str, str]:
    """Return the port's module for each module that a pattern matches."""
    pairs: dict[str, str] = {}
    for pattern, own in patterns.items():
        regex, parts = r"([^.]+)".join(map(re.escape, pattern.split("*"))), own.split("*")
        found = [match for name, _ in module.named_modules() if (match := re.fullmatch(regex, name))]
        if not found:
            raise SystemExit(f"{type(module).__name__} has no module {pattern}")
        for match in found:
            pairs[match[0]] = "".join(part + star for part, star in zip(parts, (*match.groups(), ""), strict=True))
    return pairs


def run_component(module: nn.Module, inputs: list[Tensor], names: Iterable[str]) -> tuple[dict[str, Tensor], Tensor]:
    """Return the outputs of modules, in the order of the calls, and that of the whole."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(_module: nn.Module, _given: Any, output: Any) -> None:  # a value returned would replace the output
            outputs.setdefault(name, first(output).detach().clone())

        return hook

    handles = [module.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    with torch.no_grad():
        result = first(module(*inputs))
    for handle in handles:
        handle.remove()
    return outputs, result


def first(output: Any) -> Tensor:
    """Return a tensor, or the first one of a tuple."""
    return output[0] if isinstance(output, tuple) else output


def value_of(value: Any, random: torch.Generator, place: Mapping[str, Any]) -> Any:
    """Return a tensor for a description of one, and anything else as it is."""
    return tensor(value, random, place) if isinstance(value, (dict, list)) else value


def tensor(value: Any, random: torch.Generator, place: Mapping[str, Any]) -> Tensor:
    """Return the tensor of ``{"normal": SHAPE}``, ``{"integers": SHAPE, "below": LIMIT}`` or a list of numbers."""
    if isinstance(value, dict) and "integers" in value:
        return torch.randint(0, value["below"], value["integers"], generator=random).to(place["device"])
    made = torch.randn(value["normal"], generator=random) if isinstance(value, dict) else torch.tensor(value)
    return made.to(**place) if made.is_floating_point() else made.to(place["device"])


def write(
    folder: Path, precision: str, inputs: Mapping[str, Tensor], result: Tensor, outputs: Mapping[str, Tensor]
) -> None:
    """Write one case."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {"inputs": inputs, f"outputs_{precision}": {"output": result}, f"intermediates_{precision}": outputs}
    for name, tensors in found.items():
        save_file({key: value.cpu().contiguous() for key, value in tensors.items()}, folder / f"{name}.safetensors")


def find(entry: str) -> Any:
    """Import ``package.module:attribute``."""
    module, _, attribute = entry.partition(":")
    return getattr(importlib.import_module(module), attribute)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
