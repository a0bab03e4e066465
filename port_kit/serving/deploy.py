"""Deploy files of vLLM-Omni for ports: translated into engine options.

vLLM-Omni reads a deploy file only for the pipelines of its own registry. A port is a pipeline of a plugin, and its
server would start without the options of the file, and without an error.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from port_kit.errors import ConfigError
from port_kit.escape import quoted, reason_of

#: Keys of the file that are options, with their types.
ENGINE: dict[str, type] = {"dtype": str, "quantization": str, "distributed_executor_backend": str}
#: Keys of the file that need no option, with the only value that a port has.
FIXED: dict[str, Any] = {"async_chunk": False, "trust_remote_code": False}
#: Keys of a stage that are options, with their types.
STAGE: dict[str, type] = {
    **dict.fromkeys(("tensor_parallel_size", "cfg_parallel_size", "ulysses_degree", "ring_degree"), int),
    **dict.fromkeys(("allgather_degree", "text_encoder_tp_size", "vae_patch_parallel_size"), int),
    **dict.fromkeys(("hsdp_shard_size", "hsdp_replicate_size", "max_num_seqs"), int),
    **dict.fromkeys(("use_hsdp", "enforce_eager", "step_execution", "vae_use_slicing", "vae_use_tiling"), bool),
    **dict.fromkeys(("enable_cpu_offload", "enable_layerwise_offload"), bool),
    **dict.fromkeys(("ulysses_mode", "cache_backend", "diffusion_attention_backend"), str),
    "diffusion_kv_cache_dtype": str,
    **dict.fromkeys(("cache_config", "diffusion_attention_config", "diffusion_offload_config"), dict),
}
#: Keys of a stage that are read here.
PLACE = ("stage_id", "devices")


def engine_options(path: Path) -> list[str]:
    """Return the options of ``vllm serve`` that a deploy file stands for.

    Raises:
        ConfigError: the file cannot be read, or has a key or a value that a port does not have.
    """
    found = _read(path)
    _check_names(path, "the file", found, (*ENGINE, *FIXED, "stages"))
    for name, value in FIXED.items():
        if found.get(name, value) is not value:
            raise ConfigError(f"{path}: {name} is {quoted(found[name])}; a port needs {value}", hint="remove it")
    stages = found.get("stages")
    if not isinstance(stages, list) or len(stages) != 1 or not isinstance(stages[0], dict):
        raise ConfigError(f"{path}: stages is not a list of one stage", hint="write one entry: stages: [{stage_id: 0}]")
    stage = stages[0]
    _check_names(path, "the stage", stage, (*PLACE, *STAGE))
    if stage.get("stage_id") != 0:
        raise ConfigError(
            f"{path}: stage_id is {quoted(stage.get('stage_id'))}; ports have 0", hint="write stage_id: 0"
        )
    options = [*_options(path, found, ENGINE), *_options(path, stage, STAGE)]
    if "devices" in stage:
        devices = _typed(path, "devices", stage["devices"], str)
        options += ["--stage-overrides", json.dumps({"0": {"devices": devices}})]
    return options


def _read(path: Path) -> dict[str, Any]:
    import yaml

    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(
            f"cannot read {path}: {reason_of(error)}", hint="give a deploy file of vLLM-Omni, in YAML"
        ) from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path} holds {type(found).__name__}; names with values are required", hint="write stages:")
    return found


def _check_names(path: Path, where: str, found: Mapping[Any, Any], known: Iterable[str]) -> None:
    known = list(known)
    for name in found:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {quoted(near[0])}?" if near else f"known are {', '.join(known)}"
            raise ConfigError(f"{path}: {where} has the key {quoted(name)}, which no port reads", hint=hint)


def _options(path: Path, found: Mapping[str, Any], known: Mapping[str, type]) -> Iterable[str]:
    for name, kind in known.items():
        if name not in found:
            continue
        value = _typed(path, name, found[name], kind)
        option = f"--{name.replace('_', '-')}"
        if kind is bool:
            yield from [option] if value else []
        else:
            yield from (option, json.dumps(value) if kind is dict else str(value))


def _typed(path: Path, name: str, value: Any, kind: type) -> Any:
    """Check the type of a value; ``true`` is no number."""
    if type(value) is not kind:
        raise ConfigError(
            f"{path}: {name} is {quoted(value)}; {kind.__name__} is required", hint="correct it in the file"
        )
    return value
