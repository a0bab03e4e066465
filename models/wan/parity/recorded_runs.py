"""Recorded end-to-end runs of the originals' engines, and their translation to requests of ports."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from port_kit.download import Recipe
from port_kit.parity import Bound
from port_kit.port import resolve
from port_kit.registry import find_port

#: Factor on a recorded rounding error; two independent roundings of size g are about 1.41 g apart.
GAPS = 1.5
#: Suffix of a recorded path if the engine received the opened image.
_OPENED = " (PIL)"


@dataclass(frozen=True)
class RunRecording:
    """Recorded arguments and outputs of the original's engine.

    Attributes:
        record: arguments, constants and shapes.
        tensors: noise, latents after every step, some decoded frames, the audio.
        folder: base of relative paths in the arguments.
        bounds: of a tensor's difference, if derived from the rounding of the run.
    """

    record: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor]
    folder: Path
    bounds: Mapping[str, Bound] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path, precision: str = "fp32") -> RunRecording:
        """Read ``record_<precision>.json`` and ``trajectory_<precision>.safetensors``."""
        record = json.loads((folder / f"record_{precision}.json").read_text(encoding="utf-8"))
        tensors = load_file(folder / f"trajectory_{precision}.safetensors")
        if precision == "fp32":
            return cls(record, tensors, folder)
        exact = load_file(folder / "trajectory_fp32.safetensors")
        return cls(record, tensors, folder, {name: _gap(value, exact[name]) for name, value in tensors.items()})

    @property
    def arguments(self) -> Mapping[str, Any]:
        """Arguments of the engine."""
        arguments: Mapping[str, Any] = self.record["args"]
        return arguments

    def media(self, kind: str) -> list[str]:
        """Return the paths of the reference ``image`` or ``audio`` files, in order."""
        named = sorted(name for name in self.arguments if name.startswith(kind) and name.endswith("_path"))
        paths = [self.arguments[name] for name in named if self.arguments[name] is not None]
        return [str((self.folder / path.removesuffix(_OPENED)).resolve()) for path in paths]


@dataclass(frozen=True)
class RecordedRun:
    """A recorded run.

    Attributes:
        folder: path in a goldens folder.
        port: name of the port.
        rope: returns the ``rope`` section of ``transformer/config.json`` for a record.
        index: returns changes of ``model_index.json`` for a record.
        options: names of the arguments that only this port has.
    """

    folder: str
    port: str
    rope: Callable[[Mapping[str, Any]], Mapping[str, Any]]
    index: Callable[[Mapping[str, Any]], Mapping[str, Any]]
    options: tuple[str, ...]

    @property
    def recipe(self) -> Recipe:
        """Recipe of the port."""
        recipe: Any = resolve(find_port(self.port).recipe)
        return recipe  # type: ignore[no-any-return]

    def request(self, recording: RunRecording) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the recorded arguments as a prompt and fields of the sampling parameters, with the recorded noise."""
        given = recording.arguments
        size = given["video_frame_height_width"] or (None, None)
        noise = {f"{name}_noise": recording.tensors[f"{name}.noise"] for name in ("video", "audio")}
        names = ("solver_name", "shift", "video_negative_prompt", "audio_negative_prompt", *self.options)
        media = {kind: recording.media(kind) for kind in ("image", "audio")}
        return {"prompt": given["text_prompt"], "multi_modal_data": media}, {
            "height": size[0],
            "width": size[1],
            "num_inference_steps": given["sample_steps"],
            "seed": given["seed"],
            "extra_args": {**noise, **{name: given[name] for name in names}},
        }


def _gap(rounded: torch.Tensor, exact: torch.Tensor) -> Bound:
    """Return a bound from the rounding error of the original."""
    gap = (rounded.double() - exact.double()).norm() / exact.double().norm()
    return Bound(rel_l2=GAPS * gap.item(), why=f"{GAPS} times the original's own distance from float32")


def _dreamid_rope(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the ``rope`` section; the engine divides the lengths in the dtype of the run."""
    constants = record["constants"]
    dtype = record["call0"]["freqs_scaling"].split()[0].removeprefix("torch.")
    scaling = {"num": constants["video_latent_length"], "den": constants["audio_latent_length"], "dtype": dtype}
    return {"family": "dreamid_omni", "freqs_scaling": scaling}


def _ovi_index(record: Mapping[str, Any]) -> Mapping[str, Any]:
    constants = dict(record["constants"])
    return {"video_area": constants.pop("target_area"), "skip_block": record["args"]["slg_layer"], **constants}


DREAMID = RecordedRun(
    "e2e_dreamid",
    "dreamid_omni",
    rope=_dreamid_rope,
    index=lambda record: record["constants"],
    options=("video_cfg_scale", "video_ref_cfg_scale", "audio_cfg_scale", "audio_ref_cfg_scale"),
)
OVI_T2V, OVI_I2V = (
    RecordedRun(
        folder,
        "ovi",
        rope=lambda record: {"family": "ovi"},
        index=_ovi_index,
        options=("video_guidance_scale", "audio_guidance_scale", "slg_layer"),
    )
    for folder in ("e2e_ovi_t2v", "e2e_ovi_i2v")
)
