"""A LoRA file with the base model's original names, as what vLLM-Omni's LoRA manager takes.

The manager reads PEFT folders whose names are the port's own. A pipeline that has ``_load_diffusion_lora_adapter``
is asked first: there a port calls :func:`read_adapter`, and files of PEFT, diffusers, kohya-style trainers or the
original code work, renamed by the rules that load the base model. What does not fit is refused by name before any layer
changes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from port_kit.errors import InputError
from port_kit.manifest import Manifest
from port_kit.remap import RuleSet
from port_kit.remap.lora import remap_lora, unflatten

if TYPE_CHECKING:
    from torch import Tensor, dtype, nn
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.peft_helper import PEFTHelper

#: Ends of names, without ``.weight`` and an adapter's own name, and which of the two matrices they are.
_MATRICES = {"lora_A": "a", "lora_down": "a", "lora_B": "b", "lora_up": "b"}
#: Settings of PEFT's ``adapter_config.json`` that would change the result and are not supported.
_UNSUPPORTED = ("use_dora", "modules_to_save", "alpha_pattern", "rank_pattern", "trainable_token_indices")


class Sizes(NamedTuple):
    """Inputs and outputs of a linear, or of one projection in a fused one; full sizes, not a rank's part."""

    inputs: int
    outputs: int


def read_adapter(
    path: str | Path,
    module: nn.Module,
    rules: RuleSet,
    *,
    adapter: int,
    dtype: dtype,
    modules: Iterable[str] = (),
    component: str = "transformer",
) -> tuple[LoRAModel, PEFTHelper]:
    """Read a LoRA file for a component.

    Args:
        path: a ``.safetensors`` file, or a folder with one (and PEFT's ``adapter_config.json``, where there is one).
        module: the component; its ``packed_modules_mapping`` says what is fused.
        rules: that load the component from its original names.
        adapter: the request's ``lora_int_id``.
        dtype: in which the matrices are kept.
        modules: names of modules in the base model's checkpoint, for files that write them with underscores.
        component: the component's name in the pipeline.

    Raises:
        InputError: ``lora_file``; what is wrong with the file or does not fit the model, by the file's names.
        RemapError: adapters of modules that the rules do not know, or that cannot follow what they do with the weight.
    """
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.lora_weights import LoRALayerWeights
    from vllm.lora.peft_helper import PEFTHelper

    file, settings = _find(Path(path))
    sizes = adaptable(module)
    tensors = unflatten(_read(file), modules)
    loras = {}
    renamed = remap_lora(tensors, rules, target=_base(module), parts=getattr(module, "packed_modules_mapping", None))
    for name, parts in _matrices(renamed, file).items():
        a, b = parts["a"], parts["b"]
        _check(name, a, b, sizes.get(name), file)
        rank = a.shape[0]
        alpha = float(parts["alpha"]) if "alpha" in parts else settings.get("lora_alpha", rank)
        scaling = alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
        full = f"{component}.{name}"
        loras[full] = LoRALayerWeights(full, rank, rank, a.to(dtype), b.to(dtype).clone(), scaling)
    if not loras:
        raise _bad(file, "it holds no adapter")
    rank = max(lora.rank for lora in loras.values())
    return LoRAModel(adapter, rank, loras), PEFTHelper(r=rank, lora_alpha=rank, target_modules=list(loras))


def _base(module: nn.Module) -> Manifest:
    """The manifest of a module as it was before an earlier adapter wrapped its linears."""
    found = Manifest.from_module(module)
    return Manifest({name.replace(".base_layer.", "."): spec for name, spec in found.items()}, origin=found.origin)


def adaptable(module: nn.Module) -> dict[str, Sizes]:
    """Return the linears of a module that can be adapted; the parts of a fused one by names of their own."""
    from vllm.model_executor.layers.linear import LinearBase, QKVParallelLinear

    packed: Mapping[str, list[str]] = getattr(module, "packed_modules_mapping", {})
    found = {}
    for path, layer in module.named_modules():
        if not isinstance(layer, LinearBase):
            continue
        own: Any = layer  # the sizes below are attributes of some linears only
        name = path.removesuffix(".base_layer")  # an earlier adapter has wrapped it
        parent, dot, leaf = name.rpartition(".")
        if leaf not in packed:
            found[name] = Sizes(own.input_size, own.output_size)
            continue
        outputs = list(own.output_sizes)
        if isinstance(own, QKVParallelLinear):
            key = own.total_num_kv_heads * own.head_size
            outputs = [own.total_num_heads * own.head_size, key, own.total_num_kv_heads * own.v_head_size]
        for part, size in zip(packed[leaf], outputs, strict=True):
            found[f"{parent}{dot}{part}"] = Sizes(own.input_size, size)
    return found


def _find(path: Path) -> tuple[Path, dict[str, Any]]:
    """Return the file, and PEFT's settings where they lie beside it."""
    if path.is_file():
        return path, {}
    files = [path / "adapter_model.safetensors"] if (path / "adapter_model.safetensors").is_file() else []
    files = files or sorted(path.glob("*.safetensors"))
    if len(files) != 1:
        raise _bad(path, f"it has {len(files)} .safetensors files; one is required")
    config = path / "adapter_config.json"
    if not config.is_file():
        return files[0], {}
    try:
        settings = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise _bad(config, f"it cannot be read: {error}") from error
    refused = [name for name in _UNSUPPORTED if settings.get(name)]
    if refused:
        raise _bad(config, f"{refused[0]} is set, which is not supported")
    return files[0], settings


def _read(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise _bad(file, f"it cannot be read: {error}") from error


def _matrices(tensors: Mapping[str, Tensor], file: Path) -> dict[str, dict[str, Tensor]]:
    """Sort a renamed file by module; every module has both matrices."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        module, mark, rest = name.partition(".lora_")
        kind = _MATRICES.get(f"lora_{rest.split('.')[0]}") if mark else None
        if name.endswith(".alpha"):
            module, kind = name.removesuffix(".alpha"), "alpha"
        if kind is None:
            raise _bad(file, f"{name} is no LoRA matrix; LoRA's two matrices and alpha are supported")
        found.setdefault(module, {})[kind] = tensor
    for module, parts in found.items():
        missing = [kind for kind in ("a", "b") if kind not in parts]
        if missing:
            raise _bad(file, f"{module} lacks {'lora_A (lora_down)' if missing[0] == 'a' else 'lora_B (lora_up)'}")
    return found


def _check(name: str, a: Tensor, b: Tensor, sizes: Sizes | None, file: Path) -> None:
    if sizes is None:
        raise _bad(file, f"{name} is no linear of this model")
    wanted = (sizes.outputs, sizes.inputs)
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or (b.shape[0], a.shape[1]) != wanted:
        raise _bad(file, f"{name} has A {list(a.shape)} and B {list(b.shape)}; {wanted[0]} x {wanted[1]} is adapted")


def _bad(path: Path, problem: str) -> InputError:
    return InputError(f"LoRA {path}: {problem}", code="lora_file", hint="give a LoRA made for this base model")
