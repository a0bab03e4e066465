"""LoRA files with original names, converted for vLLM-Omni's LoRA manager.

The manager reads PEFT folders with the port's own names. A pipeline may define ``_load_diffusion_lora_adapter``, which
the manager calls first; a port calls :func:`read_adapter` there. Files of PEFT, diffusers, kohya-style trainers and the
original code are supported. Names are mapped by the rules of the base model. Unknown modules, and features that the
manager does not apply (DoRA, biases, weight differences), are errors before any layer changes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from port_kit.errors import InputError
from port_kit.escape import reason_of
from port_kit.manifest import Manifest, TensorSpec
from port_kit.remap import RuleSet
from port_kit.remap.lora import read_entry, remap_lora, restore_names, split_by_part
from port_kit.upstream.checks import require

if TYPE_CHECKING:
    from torch import Tensor, dtype, nn
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.lora_weights import LoRALayerWeights
    from vllm.lora.peft_helper import PEFTHelper

#: Largest rank that the manager allocates, and largest alpha; that of published adapters is at most twice their rank.
MAX_RANK, MAX_ALPHA = 512, 1e4
#: Tensor kinds that the manager's layers apply.
_APPLIED = ("A", "B", "alpha")
#: Unsupported settings of PEFT's ``adapter_config.json`` that would change the result.
_UNSUPPORTED = ("use_dora", "modules_to_save", "alpha_pattern", "rank_pattern", "trainable_token_indices")


@dataclass(frozen=True)
class AdaptedPart:
    """A component that a LoRA may adapt.

    Attributes:
        module: the component; its ``packed_modules_mapping`` lists fused projections. Its weights are not read.
        rules: rules that load it from its original names.
        modules: names of its modules in the base model's checkpoint, for files with underscores in place of dots.
        other_names: alternative names of these modules in files, as for
            :func:`~port_kit.remap.lora.restore_names`.
    """

    module: nn.Module
    rules: RuleSet
    modules: Collection[str] = ()
    other_names: Collection[tuple[str, str]] = field(default=())


def read_adapter(
    path: str | Path,
    module: nn.Module,
    rules: RuleSet,
    *,
    adapter: int,
    dtype: dtype,
    modules: Iterable[str] = (),
    other_names: Iterable[tuple[str, str]] = (),
    component: str = "transformer",
) -> tuple[LoRAModel, PEFTHelper]:
    """Read a LoRA file for one component, which is called ``component`` in the pipeline.

    The other arguments are those of :class:`AdaptedPart` and of :func:`read_adapters`.

    Raises:
        InputError, RemapError: as :func:`read_adapters`.
    """
    part = AdaptedPart(module, rules, tuple(modules), tuple(other_names))
    return read_adapters(path, {component: part}, adapter=adapter, dtype=dtype)


def read_adapters(
    path: str | Path,
    parts: Mapping[str, AdaptedPart],
    *,
    adapter: int,
    dtype: dtype,
    folders: Mapping[str, str] | None = None,
    unnamed: Collection[str] = (),
) -> tuple[LoRAModel, PEFTHelper]:
    """Read a LoRA file for several components.

    Args:
        path: a ``.safetensors`` file, or a folder with one and optionally PEFT's ``adapter_config.json``.
        parts: by the component's name in the pipeline.
        adapter: ``lora_int_id`` of the request.
        dtype: dtype of the matrices.
        folders: names in front of modules in files, each with the component that it means.
        unnamed: components that modules without such a name belong to, each of them; default: all of ``parts``.

    Raises:
        InputError: ``lora_file``; the file is invalid or does not match the model.
        RemapError: no rule matches a module, or a rule's operations do not apply to an adapter.
    """
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.peft_helper import PEFTHelper

    require("lora_classes")
    file, settings = _find(Path(path))
    loras: dict[str, LoRALayerWeights] = {}
    for named, tensors in split_by_part(_supported(_read(file), file), folders or {}).items():
        for name in (named,) if named else unnamed or parts:
            found = _read_part(file, settings, tensors, name, parts[name], dtype)
            if twice := sorted(set(found) & set(loras)):
                raise _bad(file, f"{twice[0]} is adapted under two names")
            loras |= found
    if not loras:
        raise _bad(file, "it holds no adapter")
    rank = max(lora.rank for lora in loras.values())
    if not 1 <= rank <= MAX_RANK:
        raise _bad(file, f"its rank is {rank}; 1 to {MAX_RANK} are supported")
    return LoRAModel(adapter, rank, loras), PEFTHelper(r=rank, lora_alpha=rank, target_modules=list(loras))


def _read_part(
    file: Path,
    settings: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    component: str,
    part: AdaptedPart,
    dtype: dtype,
) -> dict[str, LoRALayerWeights]:
    """Return the adapters of a component by the manager's names."""
    from vllm.lora.lora_weights import LoRALayerWeights

    packed: Mapping[str, list[str]] = getattr(part.module, "packed_modules_mapping", {})
    tensors = restore_names(tensors, part.modules, part.other_names)
    linears = _linears(part.module)
    adaptable = {name for path, spec in linears.items() for name in _names(path, spec, packed)}
    renamed = remap_lora(tensors, part.rules, target=_base(part.module, linears), parts=packed)
    loras = {}
    for name, found in _matrices(renamed, file).items():
        if name not in adaptable:
            raise _bad(file, f"{name} is no linear of this model")
        a, b = found["A"], found["B"]
        rank = a.shape[0]
        given = found["alpha"] if "alpha" in found else settings.get("lora_alpha", rank)
        alpha = _number(given, f"alpha of {name}", file)
        scaling = alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
        full = f"{component}.{name}"
        loras[full] = LoRALayerWeights(full, rank, rank, a.to(dtype), b.to(dtype).clone(), scaling)
    return loras


def _linears(module: nn.Module) -> dict[str, TensorSpec]:
    """Return the full shape and the shards of each linear's weight.

    Linears may be quantized or wrapped by another adapter, so the weight itself is not read.
    """
    from vllm.model_executor.layers.linear import LinearBase, QKVParallelLinear

    found = {}
    for path, layer in module.named_modules():
        if not isinstance(layer, LinearBase):
            continue
        own: Any = layer  # the sizes below are attributes of some linears only
        outputs = {str(shard): size for shard, size in enumerate(getattr(own, "output_sizes", ()))}
        if isinstance(own, QKVParallelLinear):
            q, k, v = own.total_num_heads, own.total_num_kv_heads, own.total_num_kv_heads
            outputs = {"q": q * own.head_size, "k": k * own.head_size, "v": v * own.v_head_size}
        slots, at = {}, 0
        for shard, size in outputs.items() if len(outputs) > 1 else ():
            slots[shard] = ((at, at + size), (0, own.input_size))
            at += size
        shape = (at or own.output_size, own.input_size)
        found[path.removesuffix(".base_layer")] = TensorSpec(shape, "bfloat16", slots=slots)
    return found


def _names(path: str, spec: TensorSpec, packed: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the manager's names of a linear: those of its projections if it is fused."""
    parent, dot, leaf = path.rpartition(".")
    return [f"{parent}{dot}{name}" for name in packed[leaf]] if spec.slots and leaf in packed else [path]


def _base(module: nn.Module, linears: Mapping[str, TensorSpec]) -> Manifest:
    """Return a module's manifest as it was before quantization and other adapters."""
    found = Manifest.from_module(module)
    entries = {name.replace(".base_layer.", "."): spec for name, spec in found.items()}
    aliases = {
        name.replace(".base_layer.", "."): other.replace(".base_layer.", ".") for name, other in found.aliases.items()
    }
    entries |= {f"{path}.weight": spec for path, spec in linears.items() if f"{path}.weight" not in aliases}
    return Manifest(entries, origin=found.origin, aliases=aliases)


def _number(value: object, name: str, file: Path) -> float:
    """Return a scale of an adapter, which may be a tensor with one element."""
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError) as error:
        raise _bad(file, f"{name} is not a number") from error
    if not abs(number) <= MAX_ALPHA:
        raise _bad(file, f"{name} is {number}; at most {MAX_ALPHA:g} is supported")
    return number


def adapter_files(path: Path) -> list[Path]:
    """Return the files of an adapter: its weights, and PEFT's settings if there are any.

    Raises:
        InputError: ``lora_file``; there is not exactly one file of weights.
    """
    file, _ = _find(path)
    config = path / "adapter_config.json"
    return [file, config] if path.is_dir() and config.is_file() else [file]


def _find(path: Path) -> tuple[Path, dict[str, Any]]:
    """Return the file and PEFT's settings, empty if there are none."""
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
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise _bad(config, f"it cannot be read: {reason_of(error)}") from error
    if not isinstance(settings, dict):
        raise _bad(config, f"it holds {type(settings).__name__}, not an object")
    refused = [name for name in _UNSUPPORTED if settings.get(name)]
    if refused:
        raise _bad(config, f"{refused[0]} is set, which is not supported")
    return files[0], settings


def _read(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(file)
    except (OSError, ValueError, SafetensorError) as error:
        raise _bad(file, f"it cannot be read: {reason_of(error)}") from error
    for name, tensor in tensors.items():
        if not bool(tensor.float().isfinite().all()):
            raise _bad(file, f"{name} has values that are not finite")
    return tensors


def _supported(tensors: dict[str, Tensor], file: Path) -> dict[str, Tensor]:
    """Return the tensors; raise an error for kinds that the manager's layers do not apply."""
    for name in tensors:
        entry = read_entry(name)
        if entry is not None and entry.kind not in _APPLIED:
            raise _bad(file, f"{name} is a tensor of kind {entry.kind}; only matrices A and B and alpha can be applied")
    return tensors


def _matrices(tensors: Mapping[str, Tensor], file: Path) -> dict[str, dict[str, Tensor]]:
    """Return a renamed file's tensors by module and kind."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        entry = read_entry(name)
        assert entry is not None
        parts = found.setdefault(entry.module, {})
        if entry.kind in parts:
            raise _bad(file, f"{name} is of a second adapter of {entry.module}; one is required")
        parts[entry.kind] = tensor
    return found


def _bad(path: Path, problem: str) -> InputError:
    return InputError(f"LoRA {path}: {problem}", code="lora_file", hint="give a LoRA made for this base model")
