"""Files of LoRAs: what an adapter consists of, the scale that its trainer stored, and errors that name other files.

A scale is never guessed. It is in tensors (``alpha``), in PEFT's ``adapter_config.json`` beside the weights, or in the
metadata that diffusers writes. A file without any of them has the scale in its matrices, as the original trainers save
it; but PEFT's own files always have settings, so one of them alone is an error.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from port_kit.checkpoint.byte_sources import FileSource
from port_kit.checkpoint.containers import PICKLE_SUFFIXES, looks_like_safetensors, looks_like_torch
from port_kit.checkpoint.lora_names import read_entry, read_other
from port_kit.errors import CheckpointError, InputError, RemapError
from port_kit.escape import reason_of
from port_kit.manifest import Manifest, TensorSpec
from port_kit.runtime.lora_families import is_of_text_encoder

if TYPE_CHECKING:
    from torch import Tensor

#: PEFT's names of the two files of an adapter.
PEFT_WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
#: Key of diffusers in the metadata of a safetensors file: PEFT's settings, each with the component in front.
DIFFUSERS_KEY = "lora_adapter_metadata"
#: Prefix of modules that PEFT alone writes.
_PEFT_PREFIX = "base_model.model."
#: Unsupported settings of PEFT that would change the result.
_UNSUPPORTED = ("use_dora", "modules_to_save", "alpha_pattern", "rank_pattern", "trainable_token_indices")
_AGAIN = "download or save it again"


@dataclass(frozen=True)
class AdapterFiles:
    """The files of one adapter.

    Attributes:
        weights: the safetensors file.
        config: PEFT's settings; None without them.
        stray: True if settings lie beside several files, and could be of any.
    """

    weights: Path
    config: Path | None = None
    stray: bool = False

    @property
    def paths(self) -> list[Path]:
        """The files that decide about the adapter."""
        return [self.weights] if self.config is None else [self.weights, self.config]


@dataclass(frozen=True)
class Adapter:
    """The content of one adapter.

    Attributes:
        file: of the weights, for messages.
        tensors: by the names in the file.
        settings: PEFT's; empty if the scales are in the tensors.
    """

    file: Path
    tensors: Mapping[str, Tensor]
    settings: Mapping[str, Any]


def find_files(path: Path) -> AdapterFiles:
    """Return the files of an adapter.

    Args:
        path: a ``.safetensors`` file, or a folder with one. Settings of PEFT beside a file are those of the file if it
            has PEFT's name, or is the only one there.

    Raises:
        InputError: ``lora_file``; there is not exactly one file of weights. ``source_missing``; nothing is there.
    """
    if path.is_dir():
        files = [path / PEFT_WEIGHTS] if (path / PEFT_WEIGHTS).is_file() else sorted(path.glob("*.safetensors"))
        if len(files) != 1:
            raise _not_one(path, len(files))
        weights = files[0]
    elif path.is_file():
        weights = path
    else:
        raise InputError(f"the LoRA {path} does not exist", code="source_missing", hint="correct its path")
    config = weights.with_name(PEFT_CONFIG)
    if not config.is_file():
        return AdapterFiles(weights)
    if path.is_dir() or weights.name == PEFT_WEIGHTS:
        return AdapterFiles(weights, config)
    others = [file for file in weights.parent.glob("*.safetensors") if file.name != weights.name]
    if not others:
        return AdapterFiles(weights, config)
    return AdapterFiles(weights, stray=all(other.name != PEFT_WEIGHTS for other in others))


def check_files(path: Path) -> tuple[AdapterFiles, dict[str, Any]]:
    """Return the files of an adapter and PEFT's settings, after all checks that need no values of tensors.

    Raises:
        InputError: ``lora_file``; a file cannot be read, or is no LoRA, or its scale is unknown. ``source_missing``.
    """
    files = find_files(path)
    manifest = _read_header(files.weights)
    _check_kind(files.weights, manifest)
    settings = _settings(files)
    _check_scale(files, manifest, settings)
    return files, settings


def read_files(path: Path) -> Adapter:
    """Read an adapter.

    Raises:
        InputError: as :func:`check_files`; ``lora_file`` also for values that are not finite.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    files, settings = check_files(path)
    try:
        tensors = load_file(files.weights)
    except (OSError, ValueError, SafetensorError) as error:
        raise bad_file(files.weights, f"it cannot be read: {reason_of(error)}", _AGAIN) from error
    for name, tensor in tensors.items():
        if not bool(tensor.float().isfinite().all()):
            raise bad_file(files.weights, f"{name} has values that are not finite")
    return Adapter(files.weights, tensors, settings)


def bad_file(path: Path, problem: str, hint: str = "give a LoRA made for this base model") -> InputError:
    """Return the error of a file. Clients of a server see the last two parts of the path."""
    return InputError(f"LoRA {'/'.join(path.parts[-2:])}: {problem}", code="lora_file", hint=hint)


# -- weights --------------------------------------------------------------------------------------------------------


def _not_one(path: Path, count: int) -> InputError:
    pickles = sorted(file.name for file in path.iterdir() if file.suffix in PICKLE_SUFFIXES)
    if pickles and not count:
        return bad_file(path, f"it has no .safetensors file, but the pickle {pickles[0]}", _convert(pickles[0]))
    return bad_file(path, f"it has {count} .safetensors files; one is required", "give the path of one file")


def _convert(name: str) -> str:
    return f"pickles are not loaded, since they can run code: port-kit convert {name} lora.safetensors"


def _read_header(file: Path) -> Manifest:
    """Return the names and shapes in a file; refuse one that is no safetensors file, or a part of one."""
    try:
        with FileSource(file) as source:
            size, is_pickle = source.size, looks_like_torch(source) and not looks_like_safetensors(source)
    except OSError as error:
        raise bad_file(file, f"it cannot be read: {reason_of(error)}", "check its permissions") from error
    if not size:
        raise bad_file(file, "it is empty", _AGAIN)
    if is_pickle:
        raise bad_file(file, "it is a pickle, as torch.save writes it", _convert(file.name))
    try:
        return Manifest.from_safetensors(file)
    except (RemapError, CheckpointError) as error:
        problem = error.message.replace(str(file), "it").partition("; a safetensors file")[0]
        raise bad_file(file, problem, error.hint) from error


def _check_kind(file: Path, tensors: Mapping[str, TensorSpec]) -> None:
    """Refuse a file that is no LoRA of a transformer."""
    if not tensors:
        raise bad_file(file, "it holds no tensor", _AGAIN)
    adapters = {name: entry for name in tensors if (entry := read_entry(name))}
    if not adapters and not any(read_other(name) for name in tensors):
        total = sum(math.prod(spec.shape) for spec in tensors.values())
        shown = ", ".join(sorted(tensors)[:2])
        raise bad_file(
            file,
            f"it is a checkpoint, not a LoRA: {len(tensors)} tensors of {total:,} values, such as {shown}",
            "a checkpoint belongs into a model directory: port-kit inspect says whose it is",
        )
    texts = sum(is_of_text_encoder(entry.module) for entry in adapters.values())
    if adapters and texts == len(adapters):
        raise bad_file(
            file,
            f"it adapts a text encoder only, such as {next(iter(adapters))}",
            "give a LoRA that adapts the transformer",
        )


# -- scale ----------------------------------------------------------------------------------------------------------


def _settings(files: AdapterFiles) -> dict[str, Any]:
    """Return PEFT's settings, from its file or from diffusers' metadata; empty without them."""
    from safetensors import SafetensorError, safe_open

    if files.config is not None:
        try:
            settings = json.loads(files.config.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise bad_file(files.config, f"it cannot be read: {reason_of(error)}") from error
        return _supported(files.config, settings)
    try:
        with safe_open(files.weights, framework="numpy") as opened:
            metadata = opened.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise bad_file(files.weights, f"it cannot be read: {reason_of(error)}", _AGAIN) from error
    if DIFFUSERS_KEY not in metadata:
        return {}
    try:
        packed = json.loads(metadata[DIFFUSERS_KEY])
    except (json.JSONDecodeError, RecursionError) as error:
        raise bad_file(files.weights, f"its metadata {DIFFUSERS_KEY} cannot be read: {reason_of(error)}") from error
    if not isinstance(packed, dict):
        raise bad_file(files.weights, f"its metadata {DIFFUSERS_KEY} holds {type(packed).__name__}, not an object")
    parts: dict[str, dict[str, Any]] = {}
    for name, value in packed.items():
        part, _, key = name.rpartition(".")
        parts.setdefault(part, {})[key] = value
    found = [_supported(files.weights, part) for name, part in parts.items() if not is_of_text_encoder(f"{name}.")]
    scales = [{key: part.get(key) for key in ("lora_alpha", "use_rslora")} for part in found]
    if any(scale != scales[0] for scale in scales):
        raise bad_file(files.weights, f"{', '.join(parts)} have several scales, which is not supported")
    return found[0] if found else {}


def _supported(file: Path, settings: object) -> dict[str, Any]:
    if not isinstance(settings, dict):
        raise bad_file(file, f"it holds {type(settings).__name__}, not an object")
    refused = [name for name in _UNSUPPORTED if settings.get(name)]
    if refused:
        raise bad_file(file, f"{refused[0]} is set, which is not supported")
    return settings


def _check_scale(files: AdapterFiles, tensors: Iterable[str], settings: Mapping[str, Any]) -> None:
    """Refuse a file whose trainer stored a scale that is not there."""
    entries = [entry for name in tensors if (entry := read_entry(name))]
    scaled = {entry.module for entry in entries if entry.kind == "alpha"}
    open_ones = [entry for entry in entries if entry.kind == "A" and entry.module not in scaled]
    if not open_ones or settings.get("lora_alpha") is not None:
        return
    if settings:
        file = files.config or files.weights
        raise bad_file(file, "it has no lora_alpha, and the weights have no alpha", "add lora_alpha of the training")
    if files.stray:
        raise bad_file(
            files.weights,
            f"{PEFT_CONFIG} lies beside several .safetensors files, and may be the one of this",
            f"give a folder that holds this file and its {PEFT_CONFIG} only",
        )
    if any(entry.module.startswith(_PEFT_PREFIX) for entry in open_ones):
        raise bad_file(
            files.weights,
            f"PEFT saved it, and its settings are not beside it, so that its scale is unknown ({PEFT_CONFIG})",
            f"put the {PEFT_CONFIG} of the training beside it",
        )
