"""Names of the tensors of LoRA files: which module a tensor belongs to, and which part of an adapter it is."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple, TypeVar

from port_kit.errors import RemapError

Value = TypeVar("Value")

#: Prefixes of modules in files of PEFT, diffusers, ComfyUI and the original trainers; they may be nested.
PREFIXES = ("base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.", "unet.", "")
#: Prefixes of kohya-style files, in which the dots of a module are underscores.
FLAT_PREFIXES = ("lora_unet_", "lora_transformer_", "lora_dit_", "lycoris_")
#: The words of PEFT, kohya and diffusers for the two matrices: A is (rank, inputs), B is (outputs, rank).
_KINDS = {
    **dict.fromkeys(("lora_A", "lora_down", "lora.down", "lora_linear_layer.down"), "A"),
    **dict.fromkeys(("lora_B", "lora_up", "lora.up", "lora_linear_layer.up"), "B"),
    **dict.fromkeys(("dora_scale", "lora_magnitude_vector"), "magnitude"),
    **{kind: kind for kind in ("alpha", "diff", "diff_b")},
}
_ADAPTER = re.compile(
    r"(?P<module>.+)\.(?:"
    r"(?P<matrix>lora_A|lora_B|(?:lora_|lora\.|lora_linear_layer\.)(?:down|up)|lora_magnitude_vector)"
    r"(?:\.(?!(?:weight|bias)$)(?P<adapter>[^.]+))?(?:\.(?P<leaf>weight|bias))?"
    r"|(?P<plain>alpha|dora_scale|diff|diff_b))"
)
#: Kinds of adapters that are no sum of a weight and a product of two matrices, by the tensors that give them away.
_OTHER_KINDS = {
    "LoKr": r"lokr_\w+",
    "LoHa": r"hada_\w+",
    "LoRA of a convolution in Tucker form": r"lora_mid",
    "LoRA of an embedding": r"lora_embedding_[AB]",
    "AdaLoRA": r"lora_E|ranknum",
    "GLoRA": r"[ab][12]",
    "OFT": r"b?oft_\w+",
    "IA3": r"ia3_\w+|on_input",
    "VeRA": r"vera_\w+",
    "a scale or a replaced weight of LyCORIS": r"scalar|w_norm|b_norm|set_weight|reshape_weight",
}


class Entry(NamedTuple):
    """One tensor of a LoRA file.

    Attributes:
        name: in the file.
        module: the adapted module, with the file's prefix.
        kind: ``A``, ``B``, ``A.bias``, ``B.bias``, ``magnitude``, ``alpha``, ``diff`` or ``diff_b``.
        adapter: PEFT's name of the adapter, which several of one module differ by; mostly ``default`` or empty.
    """

    name: str
    module: str
    kind: str
    adapter: str = ""

    @property
    def suffix(self) -> str:
        """The part of the name after the module."""
        return self.name.removeprefix(self.module)


def read_entry(name: str) -> Entry | None:
    """Classify a tensor of a LoRA file by its name; None if the kind is not supported."""
    found = _ADAPTER.fullmatch(name)
    if found is None:
        return None
    kind = _KINDS[found["matrix"] or found["plain"]]
    if found["leaf"] == "bias":
        kind += ".bias"
    return Entry(name, found["module"], kind, found["adapter"] or "") if kind != "magnitude.bias" else None


def read_other(name: str) -> tuple[str, str] | None:
    """Return the kind of adapter that a tensor belongs to if it is one that is not read, and the module; else None."""
    for kind, pattern in _OTHER_KINDS.items():
        found = re.fullmatch(rf"(.+?)\.(?:{pattern})(?:\.[^.]+)*", name)
        if found is not None:
            return kind, found[1]
    return None


def restore_names(
    tensors: Mapping[str, Value], modules: Iterable[str], other_names: Iterable[tuple[str, str]] = ()
) -> dict[str, Value]:
    """Return a LoRA file's tensors under the module names of the base checkpoint.

    Args:
        tensors: by name. Tensors of unknown modules keep their names.
        modules: names of the modules in the base checkpoint. Kohya-style files write them with underscores.
        other_names: further names under which LoRA files know modules: a pattern of names in the base checkpoint, and a
            template of the other name.
    """
    modules, patterns = list(modules), [(re.compile(pattern), template) for pattern, template in other_names]
    known = {module: module for module in modules}
    for module in modules:
        for pattern, template in patterns:
            match = pattern.fullmatch(module)
            if match is not None:
                known.setdefault(match.expand(template), module)
    flat: dict[str, set[str]] = {}
    for name, module in known.items():
        for prefix in FLAT_PREFIXES:
            flat.setdefault(prefix + name.replace(".", "_"), set()).add(module)

    def restored(name: str) -> str:
        entry = read_entry(name)
        module = entry.module if entry is not None else name.partition(".")[0]
        for bare in without_prefixes(module, PREFIXES):
            if bare in known:
                return known[bare] + name.removeprefix(module)
        meant = flat.get(module, {module})
        if len(meant) > 1:
            raise RemapError(
                f"{name} may belong to {' or '.join(sorted(meant))}",
                code="remap_ambiguous",
                hint="name the modules with dots in the file",
            )
        return next(iter(meant)) + name.removeprefix(module)

    result: dict[str, Value] = {}
    for name, value in tensors.items():
        new = restored(name)
        if new in result:
            raise RemapError(
                f"{name} and another tensor of the LoRA file are both {new}",
                code="remap_collision",
                hint="keep one of the two in the file",
            )
        result[new] = value
    return result


def split_by_part(tensors: Mapping[str, Value], folders: Mapping[str, str]) -> dict[str, dict[str, Value]]:
    """Return a LoRA file's tensors by the part of the model that they are for.

    Args:
        tensors: by name.
        folders: first words of modules' names in files of a model with several parts, each with the part it means.

    Returns:
        By part, the tensors without that word. Those that begin with none of the words are under an empty string.

    Raises:
        RemapError: ``remap_collision``; two tensors of a part have one name.
    """
    parts: dict[str, dict[str, Value]] = {}
    for name, value in tensors.items():
        part, own = _part_of(name, folders)
        if own in parts.setdefault(part, {}):
            raise RemapError(
                f"{name} and another tensor of the LoRA file are both {own} of {part}",
                code="remap_collision",
                hint="keep one of the two in the file",
            )
        parts[part][own] = value
    return parts


def _part_of(name: str, folders: Mapping[str, str]) -> tuple[str, str]:
    for bare in without_prefixes(name, PREFIXES):
        first, _, rest = bare.partition(".")
        if first in folders:
            return folders[first], rest
    return "", name


def without_prefixes(name: str, prefixes: tuple[str, ...]) -> Iterator[str]:
    """Yield a name without each of the prefixes that it has, nested ones too."""
    for prefix in prefixes:
        if name.startswith(prefix):
            yield name[len(prefix) :]
            if prefix:
                yield from without_prefixes(name[len(prefix) :], tuple(one for one in prefixes if one))
