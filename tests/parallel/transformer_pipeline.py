"""A small pipeline around the fusion transformer alone: seeded latents, one step of four guidance branches.

``extra_args`` of a request: ``grid`` (frames, rows, columns of latents), ``audio_latents`` (their number),
``reference_frames`` (number of reference frames among them), ``reference_audio`` (lengths of audio references among
them), ``first_frame_clean``; or ``golden``, a folder with a recorded branch, whose inputs the first branch gets.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from vllm_omni.diffusion.data import DiffusionOutput, OmniDiffusionConfig
from vllm_omni.diffusion.distributed.utils import get_local_device
from vllm_omni.diffusion.model_loader.diffusers_loader import DiffusersPipelineLoader
from vllm_omni.diffusion.worker.request_batch import DiffusionRequestBatch

from port_kit.models.wan.transformer.model import build_transformer
from port_kit.models.wan.weights.transformer_rules import TRANSFORMER
from port_kit.parallel.cfg_batching import BatchedCFGMixin
from port_kit.parallel.hsdp import shard_before_loading
from port_kit.pipeline.model_index import read_json
from port_kit.remap import RuleSet, load_weights

Pair = tuple[Tensor, Tensor]

#: Recorded branches of the original; the model has the frequency scaling of the first.
GOLDENS = ("dreamid_one_ref_odd", "dreamid_two_refs", "dreamid_padded", "dreamid_no_refs")
#: Video and audio tokens of each: odd, shorter than the ranks, and with references and a clean first frame.
INPUTS = (
    {"grid": (31, 2, 2), "audio_latents": 7},
    {"grid": (7, 2, 2), "audio_latents": 31},
    {"grid": (31, 2, 2), "audio_latents": 2},
    {
        "grid": (4, 6, 10),
        "audio_latents": 25,
        "reference_frames": 1,
        "reference_audio": (4, 3),
        "first_frame_clean": True,
    },
)


class TransformerOnlyPipeline(nn.Module, BatchedCFGMixin):
    """The minimal interface of a pipeline of vLLM-Omni.

    Attributes:
        rules: from the original names of the transformer's weights.
    """

    rules: ClassVar[RuleSet] = TRANSFORMER

    _dit_modules: ClassVar = ["transformer"]
    _encoder_modules: ClassVar = []
    _vae_modules: ClassVar = []
    _resident_modules: ClassVar = []
    dummy_run_num_frames = 0

    def __init__(self, *, od_config: OmniDiffusionConfig, prefix: str = "") -> None:
        super().__init__()
        self.od_config = od_config
        self.transformer = self.build_transformer(read_json(od_config.model, "transformer/config.json"))
        self.weights_sources = [
            DiffusersPipelineLoader.ComponentSource(
                model_or_path=od_config.model,
                subfolder="transformer",
                revision=None,
                prefix="transformer.",
                fall_back_to_pt=False,
            )
        ]

    def build_transformer(self, config: Mapping[str, Any]) -> nn.Module:
        """Build the transformer of a ``transformer/config.json``."""
        return build_transformer(config)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load the transformer through its rules."""
        shard_before_loading(self.transformer, self.od_config, get_local_device())
        bare = ((name.removeprefix("transformer."), tensor) for name, tensor in weights)
        return load_weights(self.transformer, bare, self.rules, prefix="transformer.")

    def combine_multi_branch_cfg_noise(
        self, predictions: list[Pair], true_cfg_scale: float | dict[str, float], cfg_normalize: bool = False
    ) -> Pair:
        """Weigh the four branches unequally, so that a swap shows."""
        video, audio = (torch.stack(streams) for streams in zip(*predictions, strict=True))
        weights = torch.tensor([1.0, -0.5, 0.3, 0.2]).to(video)
        return torch.tensordot(weights, video, 1), torch.tensordot(weights, audio, 1)

    def forward(self, req: DiffusionRequestBatch, **_: Any) -> DiffusionOutput:
        """One step of four branches."""
        given = req.sampling_params.extra_args
        inputs, texts = _recorded(Path(given["golden"])) if "golden" in given else self._drawn(given)
        unused = (None, None, "audio", "video")  # as in DreamID-Omni's branches without references
        branches = [
            inputs | {"video_text": v, "audio_text": a, "unused": u} for (v, a), u in zip(texts, unused, strict=True)
        ]
        flow = self.predict_noise_with_multi_branch_cfg(True, 1.0, branches)
        return DiffusionOutput(output=flow)

    def _drawn(self, given: Mapping[str, Any]) -> tuple[dict[str, Any], list[Pair]]:
        """Seeded latents of the sizes that are asked for, and the texts of four branches."""
        random, config = torch.Generator().manual_seed(1), self.transformer.config
        texts = torch.randn(4, 2, 1, min(9, config.video.text_len), config.video.text_dim, generator=random)
        inputs = {
            "video": torch.randn(1, config.video.in_channels, *given["grid"], generator=random),
            "audio": torch.randn(1, given["audio_latents"], config.audio.in_channels, generator=random),
            "timestep": torch.tensor([937]),
            "video_reference_frames": given.get("reference_frames", 0),
            "audio_reference_lengths": tuple(given.get("reference_audio", ())),
            "first_frame_clean": given.get("first_frame_clean", False),
        }
        return inputs, [(video, audio) for video, audio in texts]


def _recorded(folder: Path) -> tuple[dict[str, Any], list[Pair]]:
    """A recorded pass of the original; the other three branches have its texts, changed."""
    meta = json.loads((folder / "inputs.json").read_text())
    tensors = load_file(folder / "inputs.safetensors")
    inputs = {
        "video": tensors["vid.0"][None],
        "audio": tensors["audio.0"][None],
        "timestep": tensors["t"],
        "video_reference_frames": sum((meta["ref_ip_lengths"] or [[]])[0]),
        "audio_reference_lengths": tuple((meta["ref_audio_lengths"] or [[]])[0]),
    }
    video, audio = tensors["vid_context.0"][None], tensors["audio_context.0"][None]
    return inputs, [(factor * video, factor * audio) for factor in (1.0, -1.0, 0.5, 0.25)]


def register(name: str = "TransformerOnlyPipeline", module: str = __name__) -> None:
    """Register a pipeline in this process."""
    from vllm_omni.diffusion.registry import register_diffusion_model

    register_diffusion_model(model_arch=name, module_name=module, class_name=name)


def write_model(folder: Path, pipeline: str, config: Mapping[str, Any]) -> Path:
    """Write a model directory without weights; return the folder of the transformer."""
    transformer = folder / "transformer"
    transformer.mkdir(parents=True)
    (transformer / "config.json").write_text(json.dumps(config))
    index = {"_class_name": pipeline, "_diffusers_version": "0.40.0"}
    (folder / "model_index.json").write_text(json.dumps(index))
    return transformer
