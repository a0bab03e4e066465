"""Golden cases of the fusion transformer: read one, build its model, run it sample by sample."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from port_kit.models.wan_fusion.rules_transformer import TRANSFORMER
from port_kit.models.wan_fusion.transformer import WanFusionTransformer, build_transformer
from port_kit.remap import load_weights


@dataclass(frozen=True)
class FusionCase:
    """One recorded forward pass of the original."""

    folder: Path
    meta: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.folder.name

    @property
    def config(self) -> dict[str, Any]:
        """The transformer's config: the recorded towers, and the rope that the case was run with."""
        towers = json.loads((self.folder / self.meta["config"]).read_text())
        rope = {key: self.meta[key] for key in ("family", "freqs_scaling") if key in self.meta}
        return {**towers, "rope": rope}

    def build(self) -> WanFusionTransformer:
        """Build the model on the default dtype and load the recorded checkpoint."""
        model = build_transformer(self.config)
        state = load_file(self.folder / self.meta["state"])
        load_weights(model, state.items(), TRANSFORMER)
        return model

    def outputs(self, kind: str) -> dict[str, Tensor]:
        """Return what the original gave, ``fp32`` or ``bf16``."""
        return load_file(self.folder / f"outputs_{kind}.safetensors")

    def run(self, model: WanFusionTransformer, dtype: torch.dtype) -> Iterator[tuple[int, str, Tensor]]:
        """Yield (sample, name, flow) of every sample, each run alone."""
        inputs = load_file(self.folder / "inputs.safetensors")
        for sample in range(self.meta["batch"]):
            video, audio = self._run_sample(model, inputs, sample, dtype)
            yield from ((sample, f"{name}.{sample}", x[0]) for name, x in (("vid", video), ("audio", audio)))

    def _run_sample(
        self, model: WanFusionTransformer, inputs: Mapping[str, Tensor], sample: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        config = model.config
        nothing = {
            "vid": torch.empty(config.video_channels, 0, 2, 2),
            "audio": torch.empty(0, config.audio_channels),
            "vid_context": torch.empty(0, config.text_dim),
            "audio_context": torch.empty(0, config.text_dim),
        }
        video, audio, video_text, audio_text = (
            inputs.get(f"{name}.{sample}", default)[None].to(dtype) for name, default in nothing.items()
        )
        pictures, voices = (
            tuple((self.meta.get(key) or {sample: ()})[sample]) for key in ("ref_ip_lengths", "ref_audio_lengths")
        )
        with torch.inference_mode():
            return model(
                video,
                audio,
                inputs["t"][sample],
                video_text,
                audio_text,
                video_reference_frames=sum(pictures),
                audio_reference_lengths=voices,
                first_frame_clean=self.meta.get("first_frame_is_clean", False),
                skip_block=self.meta.get("slg_layer"),
            )


def fusion_cases(goldens: Path) -> dict[str, FusionCase]:
    """Return all recorded cases by name."""
    folders = (path.parent for path in sorted(goldens.glob("fusion/*/inputs.json")))
    return {folder.name: FusionCase(folder, json.loads((folder / "inputs.json").read_text())) for folder in folders}
