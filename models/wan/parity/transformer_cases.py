"""Golden cases of the fusion transformer: recorded forward calls of the original, and recorded rotations.

``inputs.json`` of a case has its checkpoint, lengths, references and frequency scaling. Samples of a recorded batch
have different lengths, so each runs separately.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from port_kit.models.wan.parity import activation_hooks
from port_kit.models.wan.transformer.config import FusionConfig, RopeConfig
from port_kit.models.wan.transformer.model import WanFusionTransformer, build_transformer
from port_kit.models.wan.transformer.rope import RopeTables, rotate
from port_kit.models.wan.weights.transformer_rules import TRANSFORMER
from port_kit.parity import Bound, Case, Pair
from port_kit.remap import load_weights
from port_kit.runtime.single_process import single_rank

FP32 = Bound(max_abs=5e-5, why="the same mathematics in another order of summation")
ROPE = Bound(max_abs=1e-6, why="the same operations in the same order")
#: Factor on a recorded rounding error; two independent roundings of size g are about 1.41 g apart.
BF16_FACTOR = 1.5
#: Ratio of video to audio latents of a 5 s clip, used for the recorded rotations.
DREAMID_SCALING = 31 / 157


@dataclass(frozen=True)
class TransformerGolden:
    """A recorded forward call with one or more samples."""

    folder: Path
    meta: Mapping[str, Any]

    @property
    def config(self) -> dict[str, Any]:
        """Configuration of the transformer: the recorded towers, and the ``rope`` section of the case."""
        towers = json.loads((self.folder / self.meta["config"]).read_text(encoding="utf-8"))
        rope = {key: self.meta[key] for key in ("family", "freqs_scaling") if key in self.meta}
        return {**towers, "rope": rope}

    @property
    def samples(self) -> range:
        """Samples that can be compared.

        In a batch, the original computes wrong positions of audio references for all samples but the first: it divides
        the offset repeatedly. Its engine runs single samples only, and the port does not reproduce the error.
        """
        misplaced = self.meta["family"] == "dreamid_omni" and self.meta.get("ref_audio_lengths")
        return range(1 if misplaced else self.meta["batch"])

    def build(self) -> WanFusionTransformer:
        """Build the model on the current default dtype and load the recorded checkpoint."""
        model = build_transformer(self.config)
        load_weights(model, load_file(self.folder / self.meta["state"]).items(), TRANSFORMER)
        return model

    def recorded(self, name: str) -> dict[str, Tensor]:
        """Return the tensors of ``<name>.safetensors``, or none if the case does not have the file."""
        path = self.folder / f"{name}.safetensors"
        return load_file(path) if path.is_file() else {}

    def run(self, model: WanFusionTransformer, sample: int, dtype: torch.dtype) -> dict[str, Tensor]:
        """Run one sample; return its flows under the names of the recorded outputs."""
        config, inputs = model.config, self.recorded("inputs")
        device = model.video.head.modulation.device
        nothing = {
            "vid": torch.empty(config.video.in_channels, 0, 2, 2),
            "audio": torch.empty(0, config.audio.in_channels),
            "vid_context": torch.empty(0, config.video.text_dim),
            "audio_context": torch.empty(0, config.audio.text_dim),
        }
        video, audio, video_text, audio_text = (
            inputs.get(f"{name}.{sample}", default)[None].to(device, dtype) for name, default in nothing.items()
        )
        with torch.inference_mode():
            flows = model(
                video,
                audio,
                inputs["t"][sample].to(device),
                video_text,
                audio_text,
                video_reference_frames=sum(self._references("ref_ip_lengths", sample)),
                audio_reference_lengths=self._references("ref_audio_lengths", sample),
                first_frame_clean=self.meta.get("first_frame_is_clean", False),
                skip_layers=self._skip_layers,
            )
        return {f"{name}.{sample}": flow[0] for name, flow in zip(("vid", "audio"), flows, strict=True)}

    @property
    def _skip_layers(self) -> tuple[int, ...]:
        """Index of the omitted block, if any; DreamID-Omni accepts the argument and ignores it."""
        layer = self.meta.get("slg_layer") or 0
        return (layer,) if layer > 0 and self.meta["family"] == "ovi" else ()

    def _references(self, key: str, sample: int) -> tuple[int, ...]:
        lengths = self.meta.get(key)
        return tuple(lengths[sample]) if lengths else ()


def cases(goldens: Path, device: str = "cpu") -> Iterator[Case]:
    """Yield the cases below ``fusion/``: rotations, then forward calls in both recorded dtypes."""
    if (goldens / "fusion" / "rope" / "rope.json").is_file():
        yield Case("fusion/rope fp32", partial(_rope_pairs, goldens / "fusion" / "rope"))
    for name, golden in recorded_forwards(goldens).items():
        yield Case(f"fusion/{name} fp32", partial(_fp32_pairs, golden, device))
        if golden.recorded("outputs_bf16"):
            yield Case(f"fusion/{name} bf16", partial(_bf16_pairs, golden, device))


def recorded_forwards(goldens: Path) -> dict[str, TransformerGolden]:
    """Return the recorded forward calls below ``fusion/``, by name."""
    folders = (path.parent for path in sorted(goldens.glob("fusion/*/inputs.json")))
    return {
        folder.name: TransformerGolden(folder, json.loads((folder / "inputs.json").read_text(encoding="utf-8")))
        for folder in folders
    }


def _fp32_pairs(golden: TransformerGolden, device: str) -> Iterator[Pair]:
    expected, intermediates = golden.recorded("outputs_fp32"), golden.recorded("intermediates_fp32")
    with single_rank(torch.float32, device):
        model = golden.build()
        for sample in golden.samples:
            with activation_hooks.record_activations(model) as values:
                flows = golden.run(model, sample, torch.float32)
            # intermediate values are recorded for single samples only
            yield from (
                Pair(name, value, intermediates[name], FP32) for name, value in values.items() if name in intermediates
            )
            yield from (Pair(name, flow, expected[name], FP32) for name, flow in flows.items() if name in expected)


def _bf16_pairs(golden: TransformerGolden, device: str) -> Iterator[Pair]:
    exact, rounded = golden.recorded("outputs_fp32"), golden.recorded("outputs_bf16")
    with single_rank(torch.bfloat16, device):
        model = golden.build()
        for sample in golden.samples:
            for name, flow in golden.run(model, sample, torch.bfloat16).items():
                if name not in exact:
                    continue
                gap = (rounded[name].double() - exact[name].double()).norm() / exact[name].double().norm()
                bound = Bound(
                    rel_l2=BF16_FACTOR * gap.item(),
                    why=f"{BF16_FACTOR} times the original's {gap.item():.2e}",
                )
                yield Pair(f"{name} to fp32", flow, exact[name], bound)
                yield Pair(f"{name} to bf16", flow, rounded[name], bound)


def _rope_pairs(folder: Path) -> Iterator[Pair]:
    """Compare rotations: ``<family>.<stream>.in`` against ``<family>.<stream>.out[.<dtype of the scaling>fs]``."""
    meta = json.loads((folder / "rope.json").read_text(encoding="utf-8"))
    tensors = load_file(folder / "rope_fp32.safetensors")
    for name, expected in tensors.items():
        family, stream, kind, *scaling = name.split(".")
        if kind == "out":
            given = tensors[f"{family}.{stream}.in"]
            rope = RopeTables(_rope_config(folder, family, scaling), meta["head_dim"])
            table = _recorded_table(rope, stream, meta)
            length = table.shape[1]
            # tokens beyond the grid are padding and are not rotated
            rotated = torch.cat((rotate(given[:, :length], table), given[:, length:]), 1)
            yield Pair(name, rotated, expected, ROPE)


def _rope_config(folder: Path, family: str, scaling: list[str]) -> RopeConfig:
    if family == "ovi":
        towers = json.loads((folder.parent / "config.json").read_text(encoding="utf-8"))
        return FusionConfig.from_dict({**towers, "rope": {"family": family}}).audio.rope
    return RopeConfig("dreamid_omni", DREAMID_SCALING, "float32" if scaling == ["fp32fs"] else "bfloat16")


def _recorded_table(rope: RopeTables, stream: str, meta: Mapping[str, Any]) -> Tensor:
    referenced = rope.config.family == "dreamid_omni"
    if stream == "vid":
        return rope.video(tuple(meta["vid_grid"]), sum(meta["vid_ref"][0]) if referenced else 0)
    return rope.audio(meta["audio_grid"][0], meta["audio_ref"][0] if referenced else ())
