"""LoRA files with original names, converted for vLLM-Omni's LoRA manager.

The manager reads PEFT folders with the port's own names. A pipeline may define ``_load_diffusion_lora_adapter``, which
the manager calls first; a port calls :func:`read_adapter` there. Files of PEFT, diffusers, kohya-style trainers and the
original code are supported. Names are mapped by the rules of the base model. Unknown modules, and features that the
manager does not apply (DoRA, biases, weight differences), are errors before any layer changes.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from port_kit.errors import InputError, RemapError
from port_kit.manifest import Manifest, TensorSpec
from port_kit.remap import RuleSet
from port_kit.remap.lora import read_entry, remap_lora, restore_names, split_by_part
from port_kit.runtime.lora_families import family_of
from port_kit.runtime.lora_files import Adapter, bad_file, read_files
from port_kit.runtime.lora_sets import Members, read_set
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
        path: a ``.safetensors`` file, or a folder with one and optionally PEFT's ``adapter_config.json``; or a set of
            them (:func:`~port_kit.runtime.lora_sets.write_set`), which acts as the scaled sum.
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
    path = Path(path)
    members = read_set(path)
    found: dict[str, list[Matrices]] = {}
    for member, scale in members or [(path, 1.0)]:
        for name, matrices in _read_member(member, parts, folders or {}, unnamed).items():
            found.setdefault(name, []).append(replace(matrices, scaling=matrices.scaling * scale))
    rank, widest = max((sum(one.rank for one in every), name) for name, every in found.items())
    if not 1 <= rank <= MAX_RANK:
        raise _bad_rank(rank, widest, path, members)
    loras = {name: _layer(name, every, dtype) for name, every in found.items()}
    return LoRAModel(adapter, rank, loras), PEFTHelper(r=rank, lora_alpha=rank, target_modules=list(loras))


def _bad_rank(rank: int, name: str, path: Path, members: Members | None) -> InputError:
    if members is None:
        return bad_file(path, f"its rank in {name} is {rank}; 1 to {MAX_RANK} are supported")
    files = ", ".join(member.name for member, _ in members)
    return InputError(
        f"LoRAs {files}: their ranks in {name} add up to {rank}; at most {MAX_RANK} are supported",
        code="lora_file",
        hint="use fewer LoRAs at a time, or ones of lower rank",
    )


@dataclass(frozen=True)
class Matrices:
    """An adapter of one linear: the weight changes by ``scaling * b @ a``.

    Attributes:
        a: of shape (rank, inputs).
        b: of shape (outputs, rank).
        scaling: factor of the product.
    """

    a: Tensor
    b: Tensor
    scaling: float

    @property
    def rank(self) -> int:
        """Rows of A."""
        return int(self.a.shape[0])


def _layer(name: str, adapters: Sequence[Matrices], dtype: dtype) -> LoRALayerWeights:
    """Return the adapters of a linear as one, whose product is the scaled sum of theirs."""
    import torch
    from vllm.lora.lora_weights import LoRALayerWeights

    if len(adapters) == 1:
        (one,) = adapters
        return LoRALayerWeights(name, one.rank, one.rank, one.a.to(dtype), one.b.to(dtype).clone(), one.scaling)
    a = torch.cat([one.a.to(dtype) for one in adapters])
    b = torch.cat([one.b.float() * one.scaling for one in adapters], dim=1).to(dtype)
    return LoRALayerWeights(name, len(a), len(a), a, b, 1.0)


def _read_member(
    path: Path, parts: Mapping[str, AdaptedPart], folders: Mapping[str, str], unnamed: Collection[str]
) -> dict[str, Matrices]:
    """Return the adapters of one LoRA by the manager's names."""
    adapter = read_files(path)
    found: dict[str, Matrices] = {}
    for named, tensors in split_by_part(_supported(adapter), folders).items():
        for name in (named,) if named else unnamed or parts:
            own = _read_part(adapter, tensors, name, parts[name])
            if twice := sorted(set(own) & set(found)):
                raise bad_file(adapter.file, f"{twice[0]} is adapted under two names")
            found |= own
    if not found:
        raise bad_file(adapter.file, "it holds no adapter")
    return found


def _read_part(
    adapter: Adapter, tensors: Mapping[str, Tensor], component: str, part: AdaptedPart
) -> dict[str, Matrices]:
    """Return the adapters of a component by the manager's names."""
    file, settings = adapter.file, adapter.settings
    packed: Mapping[str, list[str]] = getattr(part.module, "packed_modules_mapping", {})
    linears = _linears(part.module)
    adaptable = {name for path, spec in linears.items() for name in _names(path, spec, packed)}
    try:
        tensors = restore_names(tensors, part.modules, part.other_names)
        renamed = remap_lora(tensors, part.rules, target=_base(part.module, linears), parts=packed)
    except RemapError as error:
        raise _misfit(adapter, error) from error
    matrices = {}
    for name, found in _matrices(renamed, file).items():
        if name not in adaptable:
            raise bad_file(file, f"{name} is no linear of this model")
        rank = found["A"].shape[0]
        given = found["alpha"] if "alpha" in found else settings.get("lora_alpha", rank)
        alpha = _number(given, f"alpha of {name}", file)
        scaling = alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
        matrices[f"{component}.{name}"] = Matrices(found["A"], found["B"], scaling)
    return matrices


def _misfit(adapter: Adapter, error: RemapError) -> RemapError:
    """Return the error of a LoRA that does not fit, with the family of models that it was trained for."""
    family = family_of(adapter.tensors)
    hint = (
        f"its names and widths are those of a LoRA of {family}; give one made for this model" if family else error.hint
    )
    message = f"LoRA {adapter.file.name}: {error.message}"
    return RemapError(message, code=error.code, hint=hint, **error.details)


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
        raise bad_file(file, f"{name} is not a number") from error
    if not abs(number) <= MAX_ALPHA:
        raise bad_file(file, f"{name} is {number}; at most {MAX_ALPHA:g} is supported")
    return number


def _supported(adapter: Adapter) -> Mapping[str, Tensor]:
    """Return the tensors; raise an error for kinds that the manager's layers do not apply."""
    file = adapter.file
    for name in adapter.tensors:
        entry = read_entry(name)
        if entry is not None and entry.kind not in _APPLIED:
            raise bad_file(
                file, f"{name} is a tensor of kind {entry.kind}; only matrices A and B and alpha can be applied"
            )
    return adapter.tensors


def _matrices(tensors: Mapping[str, Tensor], file: Path) -> dict[str, dict[str, Tensor]]:
    """Return a renamed file's tensors by module and kind."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        entry = read_entry(name)
        assert entry is not None
        parts = found.setdefault(entry.module, {})
        if entry.kind in parts:
            raise bad_file(file, f"{name} is of a second adapter of {entry.module}; one is required")
        parts[entry.kind] = tensor
    return found
